"""Rallies of a match: their frames in the match's video, as F3Set names them (``MATCH_START_END``)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmdistill.console import log_once
from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Rally
from mmdistill.data.annotations.f3set import match_name
from mmdistill.errors import format_count, format_first, suggest_nearest
from mmdistill.prepare.video import Frame, VideoError

RATE_TOLERANCE = 0.01  # of an annotated frame rate, relative; containers store rounded timestamps
MAX_TRUNCATION = 0.99  # fps; F3Set's annotations truncate frame rates: 29 is 29.97, and 23 is 23.976


@dataclass(frozen=True)
class RallySpan:
    """Frames `start` to `stop` - 1 of a match. `fps` is the annotated frame rate, or `UNKNOWN_FPS`."""

    name: str
    start: int
    stop: int
    fps: float


def spans_by_match(
    rallies: Sequence[Rally], videos: Mapping[str, Path], annotations: Path, *, skip_missing: bool = False
) -> dict[str, list[RallySpan]]:
    """The rallies of each match, sorted by their first frame. The log counts what `rallies` and `videos` lack.

    Args:
        rallies: named ``MATCH_START_END``, with ``num_frames`` = END - START.
        videos: the videos by the name of their match.
        annotations: the file of the rallies, for messages.
        skip_missing: skip the matches without a video.

    Raises:
        AnnotationError: a rally has another name or length.
        VideoError: matches have no video; names all of them. With `skip_missing`: no match has a video.
    """
    spans: dict[str, list[RallySpan]] = {}
    problems = []
    for rally in rallies:
        match = match_name(rally.video)
        if match == rally.video:
            problems.append(f"{rally.video}: the name is not MATCH_START_END")
            continue
        start, stop = map(int, rally.video[len(match) + 1 :].split("_"))
        if stop < start:
            problems.append(f"{rally.video}: END = {stop} lies before START = {start}")
        elif stop - start != rally.num_frames:
            problems.append(f"{rally.video}: num_frames={rally.num_frames} is not END - START = {stop - start}")
        spans.setdefault(match, []).append(RallySpan(rally.video, start, stop, rally.fps))
    if problems:
        raise AnnotationError(
            f"{annotations}: {format_count(len(problems), 'rally')} cannot be cut out of a match: "
            f"{format_first(problems, 3)}; prepare videos of single rallies without --annotations"
        )
    unused = sorted(set(videos) - set(spans))
    missing = sorted(set(spans) - set(videos))
    if missing and skip_missing and len(missing) < len(spans):
        num_skipped = sum(len(spans.pop(match)) for match in missing)
        others = f"{format_count(num_skipped, 'rally')} of {format_count(len(missing), 'other match')}"
        log_once(f"{annotations}: skipping {others}, because the source is one video")
    elif missing:
        lines = "".join(f"\n  {match}{suggest_nearest(match, unused)}" for match in missing)
        raise VideoError(
            f"{annotations}: {format_count(len(missing), 'match')} without a video; a video is named MATCH.mp4 or with "
            f"another suffix. Copy the videos, or remove the rallies of these matches from the file:{lines}"
        )
    if unused:
        log_once(f"{annotations}: no rally of {format_count(len(unused), 'video')}, skipping {format_first(unused, 3)}")
    return {match: sorted(found, key=lambda span: span.start) for match, found in spans.items()}


def check_frame_rate(path: Path, spans: Sequence[RallySpan], *rates: float) -> None:
    """Compare the annotated frame rate of the rallies of a match with frame rates of its video.

    A container may declare another rate than the mean over its timestamps, so that a video may have several `rates`. A
    rate of 0 is unknown. An annotated rate may be truncated to an integer.

    Raises:
        VideoError: an annotated rate is none of the rates.
    """
    known = [rate for rate in rates if rate]
    for annotated in sorted({span.fps for span in spans} - {UNKNOWN_FPS}):
        if known and not any(_is_rate(annotated, rate) for rate in known):
            raise VideoError(
                f"{path}: has {known[-1]:.2f} fps, but its rallies are annotated at {annotated:g} fps, so their frame "
                "numbers belong to another file; get the video with the annotated frame rate"
            )


def _is_rate(annotated: float, fps: float) -> bool:
    is_truncated = annotated.is_integer() and 0 <= fps - annotated < MAX_TRUNCATION
    return is_truncated or abs(fps - annotated) <= RATE_TOLERANCE * annotated


class FrameSpool:
    """Frames of one size in a temporary file, without loss, so that they can be read several times.

    The estimation of skeletons passes several times over a rally at source resolution, which does not fit into memory.
    """

    def __init__(self, path: Path) -> None:
        """Create the file at the first frame."""
        self._path, self._shape, self._count = path, (0, 0, 3), 0

    def add(self, pixels: np.ndarray) -> None:
        """Append a frame, uint8 (H, W, 3)."""
        self._shape = pixels.shape
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(pixels).data)
        self._count += 1

    def read(self) -> Iterator[Frame]:
        """The frames, numbered from 0, without timestamps."""
        size = int(np.prod(self._shape))
        with self._path.open("rb") as file:
            for number in range(self._count):
                yield Frame(number, 0.0, np.frombuffer(file.read(size), np.uint8).reshape(self._shape))

    def remove(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)
