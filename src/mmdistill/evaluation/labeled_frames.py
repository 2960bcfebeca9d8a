"""The labeled strokes of a file of examples, and the video files that show them.

Frames near a labeled stroke are known: the stroke is there, and no other one is within `KNOWN_SECONDS`. Any other frame
of a video may show a stroke that is not labeled, unless the rally is labeled completely.
"""

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Event, Rally
from mmdistill.errors import format_first
from mmdistill.evaluation.video_features import TO_END, Range
from mmdistill.prepare.sources import VIDEO_SUFFIXES
from mmdistill.prepare.video import VideoError

KNOWN_SECONDS = 0.5  # on each side of a labeled stroke; the strokes of a rally are about a second apart
KNOWN_FRAMES = 12  # on each side, if the frame rate is unknown
MIN_KNOWN_FRAMES = 2  # on each side, at any frame rate
_RALLY_NAME = re.compile(r"(.+)_(\d+)_(\d+)")  # of F3Set: MATCH_START_END


@dataclass
class LabeledFile:
    """A video file or a folder of frames, and its labeled strokes.

    Attributes:
        path: the file or folder.
        fps: frame rate as annotated, or `UNKNOWN_FPS`.
        events: labeled strokes; frames are those of the file.
        names: the video and the frame of each stroke as in the examples.
        complete: ranges of frames in which every stroke is labeled.
        without_stroke: rallies of the examples that show no stroke.
    """

    path: Path
    fps: float
    events: list[Event] = field(default_factory=list)
    names: list[tuple[str, int]] = field(default_factory=list)
    complete: list[Range] = field(default_factory=list)
    without_stroke: list[str] = field(default_factory=list)

    def known_ranges(self, fps: float) -> list[Range]:
        """The frames of which it is known whether they show a stroke: ranges in order, without overlaps.

        `fps` is the frame rate of the file, or `UNKNOWN_FPS`.
        """
        half = max(MIN_KNOWN_FRAMES, round(KNOWN_SECONDS * fps)) if fps > 0 else KNOWN_FRAMES
        near = [(max(0, event.frame - half), event.frame + half + 1) for event in self.events]
        merged: list[Range] = []
        for first, end in sorted([*near, *self.complete]):
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((first, end))
        return merged


def locate_examples(
    rallies: Sequence[Rally], new: Path, folders: Sequence[Path], *, complete: bool
) -> dict[Path, LabeledFile]:
    """The video files of the examples with their strokes, by path.

    A rally is the video of its name: `new`, a video file, or a folder of numbered JPEG files in one of `folders`. If
    there is none, and the name is MATCH_START_END as in F3Set, its frame k is frame START + k of the video MATCH.

    Args:
        rallies: the examples; those without a stroke show that there is none. A video may occur several times, with its
            length in one place only.
        new: the video that gets labels.
        folders: where the videos are searched for.
        complete: whether every stroke of the rallies is labeled. Otherwise it is known for frames near a stroke only.

    Raises:
        VideoError: there is no video of this name, or there are several.
        AnnotationError: two strokes are at one frame.
    """
    files: dict[Path, LabeledFile] = {}
    labeled = {rally.video for rally in rallies if rally.events}
    lengths = {rally.video: rally.num_frames for rally in sorted(rallies, key=lambda rally: rally.num_frames)}
    for rally in rallies:
        path, offset = _locate(rally.video, new, folders)
        file = files.setdefault(path, LabeledFile(path, rally.fps))
        if file.fps == UNKNOWN_FPS:
            file.fps = rally.fps
        if file.fps != rally.fps != UNKNOWN_FPS:
            raise AnnotationError(
                f"{rally.video}: fps={rally.fps}, but another rally of {path} has {file.fps}; correct it"
            )
        is_new = rally.video in (new.name, video_name(new))  # without a stroke it is not labeled yet
        is_empty = rally.video not in labeled
        if complete or (is_empty and not is_new):
            length = lengths[rally.video]
            file.complete.append((offset, offset + length if length else TO_END))
            file.without_stroke += [rally.video] if is_empty and rally.video not in file.without_stroke else []
        for event in rally.events:
            frame = offset + event.frame
            if other := next((e for e in file.events if e.frame == frame and e.label != event.label), None):
                raise AnnotationError(
                    f"{rally.video}: frame {event.frame} has two labels, {other.label} and {event.label}; remove one"
                )
            if Event(frame, event.label) not in file.events:
                file.events.append(Event(frame, event.label))
                file.names.append((rally.video, event.frame))
    return files


def _locate(name: str, new: Path, folders: Sequence[Path]) -> tuple[Path, int]:
    """The video of a rally, and the frame of the video that is frame 0 of the rally."""
    if found := _find(name, new, folders):
        return found, 0
    match = _RALLY_NAME.fullmatch(name)
    if match and (found := _find(match[1], new, folders)):
        return found, int(match[2])
    others = f" or {match[1]}" if match else ""
    raise VideoError(
        f"the examples name the video {name}, but there is no video file and no folder of frames {name}{others} in "
        f"{format_first([str(folder) for folder in folders], 3)}; give its folder with --videos"
    )


def _find(name: str, new: Path, folders: Sequence[Path]) -> Path | None:
    if name in (new.name, video_name(new)):
        return new
    for folder in folders:
        path = folder / name
        if path.is_file():
            return path
        near = path.parent.glob(f"{glob.escape(path.name)}.*")
        found = sorted(p for p in near if p.stem == path.name and p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        found += [path] if any(path.glob("*[0-9].[jJ][pP]*")) else []  # a folder of frames
        if len(found) > 1:
            raise VideoError(f"{found[0]} and {found[1]} have the same name; move one of them to another folder")
        if found:
            return found[0]
    return None


def video_name(path: Path) -> str:
    """The name of a video in annotations: the file name without its suffix, or the name of the folder."""
    return path.resolve().name if path.is_dir() else path.stem
