"""Rallies and events, which every annotation format is read into, and the registry of formats."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.errors import InputError, format_count
from mmdistill.plugins import Registry

MAX_PROBLEMS_SHOWN = 8


class AnnotationError(InputError):
    """An invalid annotation file. The message names the file, rally, event and field."""


@dataclass(frozen=True)
class Event:
    """An action at `frame` (counted from 0). `label` is "" for an event without a label."""

    frame: int
    label: str


@dataclass(frozen=True)
class Rally:
    """One video of `num_frames` frames. `video` is its name in the files of every modality."""

    video: str
    num_frames: int
    fps: float
    events: tuple[Event, ...]


def format_rally_counts(rallies: Sequence[Rally]) -> str:
    """``2 rallies, 5 events, 1 label``."""
    labels = [event.label for rally in rallies for event in rally.events]
    counts = ((len(rallies), "rally"), (len(labels), "event"), (len(set(labels)), "label"))
    return ", ".join(format_count(count, noun) for count, noun in counts)


def read_json(path: Path | str) -> Any:
    """The content of a JSON file.

    Raises:
        AnnotationError: the file is not JSON; names the file, line and column.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error


def is_safe_name(video: object) -> bool:
    """Whether this is text, and a path built from it stays inside the data folder. Subfolders are allowed."""
    parts = video.replace("\\", "/").split("/") if isinstance(video, str) else [""]
    return all(parts) and ".." not in parts and "\0" not in str(video)


def is_integer(value: object) -> bool:
    """Whether a JSON value is a whole number. Python's booleans are integers too."""
    return isinstance(value, int) and not isinstance(value, bool)


# (annotation file, folder with one folder of frames per video or None, number of frame 0 in file names) -> rallies
AnnotationReader = Callable[[Path, Path | None, int], list[Rally]]

ANNOTATION_FORMATS: Registry[AnnotationReader] = Registry("annotation format", "mmdistill.annotations")


def register_annotation_format(name: str) -> Callable[[AnnotationReader], AnnotationReader]:
    """Decorator that registers an `AnnotationReader` under `name`, a value of ``data_module.annotations``.

    The reader raises `AnnotationError` for an invalid file.

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
