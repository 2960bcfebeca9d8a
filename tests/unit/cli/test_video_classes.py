"""Overrides of an evaluation with the video as class."""

from mmdistill.cli.video_classes import video_class_overrides
from mmdistill.data.annotations.base import Rally
from mmdistill.data.clips import ClipSpec, build_index


def test_classes_and_queries_fit_the_videos() -> None:
    rallies = [Rally(f"v{k}", length, 25.0, ()) for k, length in enumerate((60, 49, 17))]
    clips = build_index(rallies, ClipSpec("windows", 16)).clips
    fixed = ["data_module.eval_clips=windows", "data_module.label=video", "data_module.fewshot_eval_json_path=a.json"]
    assert video_class_overrides(clips, "a.json", 5, 15) == [*fixed, "data_module.n_way=2", "data_module.q_sample=2"]
    assert video_class_overrides(clips, "a.json", [2, 5], 1) == [
        *fixed,
        "data_module.n_way=2",
        "data_module.q_sample=1",
    ]
    assert video_class_overrides(clips[:4], "a.json", 5, 15) is None
