"""Decoding of video files, frame by frame, with the decoder's timestamps."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmdistill.errors import InputError, format_count

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
COUNT_TOLERANCE = 0.02  # containers without an index only estimate their number of frames


class VideoError(InputError):
    """A video that cannot be decoded to its end. The message names the file and the last decoded frame."""


@dataclass(frozen=True)
class Frame:
    """Frame `number`, counted from 0, with its timestamp `seconds`; `pixels` is uint8 (H, W, 3) BGR."""

    number: int
    seconds: float
    pixels: np.ndarray


def decode_frames(path: Path) -> Iterator[Frame]:
    """Yield every frame of a video in order, at any frame rate, without repeating or skipping a frame.

    OpenCV opens the first half of an ``.avi`` like a complete file. The number of decoded frames is therefore compared
    with the number that the container declares, with `COUNT_TOLERANCE`.

    Raises:
        VideoError: if the file cannot be opened or has fewer frames than the container declares.
    """
    capture = cv2.VideoCapture(str(path))
    try:
        if not capture.isOpened():
            raise VideoError(f"{path}: OpenCV cannot open it as a video; convert it, for example to .mp4")
        declared = _container_frame_count(capture)
        number = 0
        while True:
            success, pixels = capture.read()
            if not success:
                break
            yield Frame(number, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, pixels)
            number += 1
    finally:
        capture.release()
    if number == 0:
        raise VideoError(f"{path}: OpenCV cannot decode any frame; convert the video, for example to .mp4")
    if declared > 0 and number < declared * (1 - COUNT_TOLERANCE) - 1:
        raise VideoError(
            f"{path}: truncated or broken, it ends after frame {number - 1}, "
            f"but the container declares {format_count(declared, 'frame')}; copy or convert it again"
        )


def container_frame_count(path: Path) -> int:
    """The number of frames that the container declares, exact or an estimate; 0 if it declares none."""
    capture = cv2.VideoCapture(str(path))
    try:
        return _container_frame_count(capture)
    finally:
        capture.release()


def _container_frame_count(capture: cv2.VideoCapture) -> int:
    return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))


def mean_frame_rate(seconds: list[float]) -> float:
    """Mean frame rate in fps from the timestamps of all frames; 0 for fewer than two frames."""
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return 0.0
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def find_repeated_frames(differences: list[float]) -> list[int]:
    """Numbers of frames that repeat the previous frame, as in 25 fps footage stored at 30 fps. Their flow is zero.

    Args:
        differences: mean absolute difference between frames k and k + 1, for each k.

    Returns:
        Frames whose difference is less than 0.4 times the median difference within three frames.
    """
    values = np.array(differences)
    found = []
    for k, difference in enumerate(values):
        median = float(np.median(values[max(0, k - 3) : k + 4]))
        if median > 0 and difference < 0.4 * median:
            found.append(k + 1)
    return found


def find_videos(source: Path) -> dict[str, Path]:
    """Video files below a folder, or the single file `source`, by file name without suffix, sorted.

    Raises:
        VideoError: if there is no video, or two videos have the same name.
    """
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise VideoError(f"{source}: no such file or folder")
    found: dict[str, Path] = {}
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()):
        if path.stem in found:
            raise VideoError(
                f"{path} and {found[path.stem]} have the same name; rename one, because output files are named after it"
            )
        found[path.stem] = path
    if not found:
        raise VideoError(f"{source}: no video file ({', '.join(VIDEO_SUFFIXES)})")
    return found
