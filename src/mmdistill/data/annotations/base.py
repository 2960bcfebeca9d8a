"""Rallies and events, which every annotation format is read into, and the registry of formats."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from mmdistill.errors import InputError, format_count
from mmdistill.plugins import Registry

MAX_PROBLEMS_SHOWN = 8
UNKNOWN_FPS = -1.0  # frame rate of a `Rally`, as F3Set stores it; nothing that is computed depends on the frame rate
# Words of keys that tell where and when an action is. Any other key may contain its class.
_PLACE_AND_TIME = {
    "video", "clip", "participant", "subject", "uid", "frame", "frames", "start", "stop", "begin", "end", "timestamp",
    "time", "sec", "seconds", "duration", "fps", "width", "height", "split", "subset", "date", "path", "file", "url",
    "folder",
}  # fmt: skip


class AnnotationError(InputError):
    """An invalid annotation file. The message names the file, rally, event and field."""


class InvalidEntriesError(AnnotationError):
    """A file with invalid rallies or events.

    Attributes:
        rallies: the valid rallies with their valid events.
        problems: a text for each invalid rally or event. The message shows the first ones. If a rally is valid, it
            also tells how to write the valid ones.
    """

    def __init__(self, path: Path | str, rallies: "list[Rally]", problems: list[str]) -> None:
        self.rallies, self.problems = rallies, problems
        shown = "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
        more = f"\n  and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        hint = "\n`mmdistill check-data ANNOTATIONS --write-clean FILE` writes a copy without them" if rallies else ""
        super().__init__(f"{path}: {format_count(len(problems), 'problem')}:\n  {shown}{more}{hint}")


@dataclass(frozen=True)
class Event:
    """An action at `frame` (counted from 0). `label` is "" for an event without a label."""

    frame: int
    label: str


@dataclass(frozen=True)
class Player:
    """A player of a rally: name and hand (F3Set: RH or LH) as in the file; "" if unknown."""

    name: str = ""
    hand: str = ""


@dataclass(frozen=True)
class Rally:
    """One video of `num_frames` frames. `video` is its name in the files of every modality. `fps` is in frames/s.

    `near` and `far` are the players at the near and the far side of the court.
    """

    video: str
    num_frames: int
    fps: float
    events: tuple[Event, ...]
    near: Player = Player()
    far: Player = Player()


def format_rally_counts(rallies: Sequence[Rally]) -> str:
    """``2 rallies, 5 events, 1 label``, or ``2 rallies, 5 events without a label``."""
    labels = [event.label for rally in rallies for event in rally.events]
    named = set(labels) - {""}
    shown = "" if labels and not named else format_count(len(named), "label")
    text = f"{format_count(len(rallies), 'rally')}, {format_count(len(labels), 'event')}"
    return f"{text}, {shown}" if shown else f"{text} without a label"


def read_json(path: Path | str) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        AnnotationError: the file is not JSON; names the file, line and column.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: not JSON ({error}); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error


def is_safe_name(video: object) -> bool:
    """Whether this is text, and a path built from it stays inside the data folder. Subfolders are allowed."""
    parts = video.replace("\\", "/").split("/") if isinstance(video, str) else [""]
    return all(parts) and ".." not in parts and "\0" not in str(video)


def _number(value: object) -> Fraction | None:
    """A JSON value that is a finite number, also as text such as ``"29.97"`` or ``"30000/1001"``; None if it is not."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return Fraction(value)
    except (ValueError, OverflowError, ZeroDivisionError):  # no number, infinite, a denominator of 0
        return None


def whole_number(value: object) -> int | None:
    """A JSON value that is a whole number, such as 52, 52.0 or the text "52"; None if it is not."""
    number = _number(value)
    return int(number) if number is not None and number.denominator == 1 else None


def frame_rate(value: object) -> float | None:
    """A JSON value that is a frame rate in frames/s; `UNKNOWN_FPS` for null and -1; None if it is no frame rate."""
    number = Fraction(UNKNOWN_FPS) if value is None else _number(value)
    return float(number) if number is not None and (number > 0 or number == UNKNOWN_FPS) else None


def keys_that_may_be_classes(entries: Sequence[Any]) -> list[str]:
    """The keys of JSON objects without the keys that tell where or when something is, such as ``start_frame``."""
    keys = {key for entry in entries if isinstance(entry, dict) for key in entry}
    return sorted(key for key in keys if key != "id" and not _PLACE_AND_TIME & set(key.lower().split("_")))


def require_valid(path: Path | str, rallies: list[Rally], problems: list[str]) -> list[Rally]:
    """The rallies of a file.

    Raises:
        InvalidEntriesError: there are problems.
        AnnotationError: there is no rally.
    """
    if problems:
        raise InvalidEntriesError(path, rallies, problems)
    if not rallies:
        raise AnnotationError(f"{path}: contains no rally; give a file with at least one")
    return rallies


# (annotation file, folder with one folder of frames per video or None, number of frame 0 in file names) -> rallies
AnnotationReader = Callable[[Path, Path | None, int], list[Rally]]

ANNOTATION_FORMATS: Registry[AnnotationReader] = Registry("annotation format", "mmdistill.annotations")


def register_annotation_format(name: str) -> Callable[[AnnotationReader], AnnotationReader]:
    """Decorator that registers an `AnnotationReader` under `name`, a value of ``data_module.annotations``.

    The reader raises `AnnotationError` for an invalid file. If parts of the file are valid, it raises
    `InvalidEntriesError` with them, so that ``check-data --write-clean`` can write them.

    Raises:
        ValueError: the name is taken.
    """
    return lambda reader: ANNOTATION_FORMATS.register(name, reader)


def load_annotations(
    path: Path | str, *, annotations: str = "f3set", frames_dir: Path | str | None = None, frame_number_offset: int = 0
) -> list[Rally]:
    """The rallies of a file in the format `annotations`.

    Formats that do not store the length of a video need `frames_dir`, a folder with one folder of frames per video.
    Formats that number frames like the file names need `frame_number_offset`, the number of frame 0 in file names.

    Raises:
        InputError: the format is unknown.
        AnnotationError: the file is invalid.
    """
    reader = ANNOTATION_FORMATS.get(annotations)
    return reader(Path(path), None if frames_dir is None else Path(frames_dir), frame_number_offset)
