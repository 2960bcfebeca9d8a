"""Video files, frame by frame, with the decoder's own timestamps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmdistill.errors import InputError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
COUNT_TOLERANCE = 0.02  # containers without an index only estimate their number of frames


class VideoError(InputError):
    """A video that cannot be read to its end; the message names the file and the frame reached."""


@dataclass(frozen=True)
class Frame:
    """Frame `number` (from 0), shown at `seconds`; `pixels` is uint8 (H, W, 3) BGR."""

    number: int
    seconds: float
    pixels: np.ndarray


def decode(path: Path) -> Iterator[Frame]:
    """Every frame of a video, in order, at whatever rate it has. No frame is repeated or left out.

    Raises:
        VideoError: where the file cannot be opened, or ends before the length that it promises. Half an ``.avi`` opens
            like a whole one, so the promised length is compared at the end, with `COUNT_TOLERANCE`.
    """
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise VideoError(f"{path}: cannot be opened as a video; no frame was reached")
        promised = _promised(capture)
        number = 0
        while True:
            good, pixels = capture.read()
            if not good:
                break
            yield Frame(number, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, pixels)
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise VideoError(f"{path}: no frame can be decoded")
    if promised > 0 and number < promised * (1 - COUNT_TOLERANCE) - 1:
        raise VideoError(
            f"{path}: truncated or broken, it ends after frame {number - 1}, but promises {promised} frames"
        )


def promised_frames(path: Path) -> int:
    """The number of frames that the container gives, exact or an estimate; 0 where it gives none."""
    capture = cv2.VideoCapture(str(path))
    try:
        return _promised(capture)
    finally:
        capture.release()


def _promised(capture: cv2.VideoCapture) -> int:
    return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def frame_rate(seconds: list[float]) -> float:
    """Frames per second from timestamps; the mean rate where they are irregular. 0 for fewer than two frames."""
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return 0.0
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def repeated_frames(changes: list[float]) -> list[int]:
    """Frames that only repeat the one before, as when 25 fps footage is stored at 30 fps: their flow is zero.

    Args:
        changes: mean absolute difference of frame k + 1 to frame k, for each k.

    A frame counts where it changes less than 0.4 times as much as is usual within three frames of it.
    """
    values = np.array(changes)
    found = []
    for k, change in enumerate(values):
        usual = float(np.median(values[max(0, k - 3) : k + 4]))
        if usual > 0 and change < 0.4 * usual:
            found.append(k + 1)
    return found


def find_videos(source: Path) -> dict[str, Path]:
    """Video files of a folder and its sub-folders (or the one file), by name without suffix, sorted.

    Raises `VideoError` where there is none, or two have the same name.
    """
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise VideoError(f"{source}: no such file or folder")
    found: dict[str, Path] = {}
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()):
        if path.stem in found:
            raise VideoError(f"{path} and {found[path.stem]} have the same name; rename one, frames are stored by it")
        found[path.stem] = path
    if not found:
        raise VideoError(f"{source}: no video file ({', '.join(VIDEO_SUFFIXES)})")
    return found
