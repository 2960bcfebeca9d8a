"""Videos with strokes that an untrained encoder can tell apart: one red or blue frame each, on gray frames."""

from pathlib import Path

import numpy as np

from mmdistill.evaluation.labeling import Example, LabeledVideo, Stroke
from mmdistill.evaluation.report.frame_images import FrameStore
from tests.generated_video import write_video
from tests.tiny_data import write_teacher

COLORS = {"fh_CC": (20, 20, 230), "bh_DL": (230, 20, 20)}  # BGR, by label
OLD = {10: "fh_CC", 26: "bh_DL", 45: "fh_CC", 60: "bh_DL", 80: "fh_CC"}
NEW = {12: "bh_DL", 40: "fh_CC", 57: "bh_DL", 85: "fh_CC"}
NUM_FRAMES = 100


def write_flashes(path: Path, strokes: dict[int, str]) -> Path:
    """A video with 25 fps of `NUM_FRAMES` frames of 48 x 64 px; `strokes` are labels by frame."""
    rng = np.random.default_rng(0)
    images = [rng.integers(110, 130, (48, 64, 3)).astype(np.uint8) for _ in range(NUM_FRAMES)]
    for frame, label in strokes.items():
        images[frame][:] = COLORS[label]
    return write_video(path, images)


def make_label_files(folder: Path) -> list[str]:
    """Two videos, an untrained checkpoint for clips of 4 frames, and examples: the arguments of ``mmdistill label``."""
    folder.mkdir(exist_ok=True)
    write_flashes(folder / "old.mp4", OLD)
    write_flashes(folder / "new.mp4", NEW)
    lines = [f"old,{frame},{label}" for frame, label in OLD.items()]
    (folder / "examples.csv").write_text("\n".join(["video,frame,label", *lines, "new,12,bh_DL"]))
    checkpoint = write_teacher(folder / "rgb", "rgb", seed=0)
    options = ["--examples", str(folder / "examples.csv"), "--stride", "1", "--output", str(folder / "out")]
    return [str(folder / "new.mp4"), "--checkpoint", str(checkpoint), *options]


def make_labeled_video(*, num_frames: int = 60, num_strokes: int = 12, fps: float = 25.0) -> LabeledVideo:
    """A result with random images of 60 frames. The strokes are 4 frames apart, and their probabilities increase."""
    rng = np.random.default_rng(0)
    images = FrameStore()
    for _ in range(60):
        images.append(rng.integers(0, 255, (48, 64, 3), np.uint8))
    strokes = []
    for k in range(num_strokes):
        p = round(0.5 + 0.04 * k, 4)
        alternatives = (("<fh>", p), ("bh", 0.01))
        strokes.append(Stroke(4 * k, "<fh>", 4 * k / fps if fps > 0 else None, p, 0.9, alternatives, ((0, 0.5),)))
    example = Example("old", 3, "<fh>", images[0])
    return LabeledVideo("new", Path("new.mp4"), num_frames, fps, strokes, [example], 20, ["A caveat."], images)
