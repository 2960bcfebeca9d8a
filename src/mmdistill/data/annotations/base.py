"""What every annotation format is read into, and the registry of formats."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.errors import InputError

SHOWN_PROBLEMS = 8


class AnnotationError(InputError):
    """An annotation file that cannot be used as it is; the message names rally, event and field."""


@dataclass(frozen=True)
class Event:
    """Something that happens at `frame` (counted from 0). `label` is "" where nobody said what."""

    frame: int
    label: str


@dataclass(frozen=True)
class Rally:
    """One video of `num_frames` frames. `video` names its files in every modality."""

    video: str
    num_frames: int
    fps: float
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with an annotation file. `event` is its position in the rally; None: the rally itself."""

    rally: str
    event: int | None
    message: str

    def __str__(self) -> str:
        where = self.rally if self.event is None else f"{self.rally}, event {self.event}"
        return f"{where}: {self.message}"


def read_json(path: Path | str) -> Any:
    """The content of a JSON file. Raises `AnnotationError` naming the file and the place."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: not JSON ({error})") from error


def is_safe_name(video: str) -> bool:
    """Whether a video's name stays inside the data folder when it becomes part of a path (sub-folders are fine)."""
    parts = video.replace("\\", "/").split("/")
    return all(parts) and ".." not in parts and "\0" not in video


AnnotationReader = Callable[[Path, Path | None, int], list[Rally]]


ANNOTATION_READERS: dict[str, AnnotationReader] = {}


def annotation_reader(name: str) -> Callable[[AnnotationReader], AnnotationReader]:
    """Register a reader under `name`, the value of ``data_module.annotations``."""

    def register(reader: AnnotationReader) -> AnnotationReader:
        if name in ANNOTATION_READERS:
            raise ValueError(f"an annotation reader {name!r} is registered already")
        ANNOTATION_READERS[name] = reader
        return reader

    return register


def load_annotations(
    path: Path | str, *, annotations: str = "f3set", frames_dir: Path | str | None = None, frame_number_offset: int = 0
) -> list[Rally]:
    """The rallies of an annotation file by the reader called `annotations`.

    Args:
        frames_dir: the folder with one folder of frames per video, for formats that do not say how long a video is.
        frame_number_offset: the number that frame 0 has in file names, for formats that count like the file names do.

    Raises:
        ValueError: for an unknown reader; `AnnotationError` for the file.
    """
    if annotations not in ANNOTATION_READERS:
        raise ValueError(f"annotations={annotations!r} is not one of {', '.join(sorted(ANNOTATION_READERS))}")
    return ANNOTATION_READERS[annotations](
        Path(path), None if frames_dir is None else Path(frames_dir), frame_number_offset
    )
