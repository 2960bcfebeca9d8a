"""Overrides that evaluate videos without labels: the class of a clip is its video."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mmdistill.config import as_ints
from mmdistill.data.clips import Clip


def video_class_overrides(clips: Sequence[Clip], annotations: str, n_way: Any, q_sample: int) -> list[str] | None:
    """The overrides, with as many classes and query clips as the videos allow, up to `n_way` and `q_sample`.

    Args:
        clips: the windows of the videos.
        annotations: annotation file of the videos, relative to the data folder.
        n_way: value of `data_module.n_way`; of a list the first.
        q_sample: value of `data_module.q_sample`.

    Returns:
        None if fewer than two videos have two clips.
    """
    counts = sorted(Counter(clip.video for clip in clips).values(), reverse=True)
    usable = [count for count in counts if count >= 2][: as_ints("n_way", n_way)[0]]
    if len(usable) < 2:
        return None
    keys = ["eval_clips=windows", "label=video", f"fewshot_eval_json_path={annotations}"]
    keys += [f"n_way={len(usable)}", f"q_sample={min(q_sample, usable[-1] - 1)}"]
    return [f"data_module.{key}" for key in keys]
