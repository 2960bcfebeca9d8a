"""The annotation format of F3Set (ICLR 2025, arXiv 2504.08222).

A JSON list of rallies with `video`, `num_frames`, `fps` and `events` (`frame`, `label`). A label has eight fields,
joined by ``_``. Frames are counted from 0.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdistill.data.annotations.base import (
    MAX_PROBLEMS_SHOWN,
    AnnotationError,
    Event,
    Rally,
    is_integer,
    is_safe_name,
    read_json,
    register_annotation_format,
)
from mmdistill.errors import format_count

F3SET_FIELDS: tuple[str, ...] = ("player", "court", "type", "side", "technique", "direction", "approach", "outcome")


def load_f3set(path: Path | str) -> list[Rally]:
    """The rallies of an F3Set JSON file, in the order of the file.

    Raises:
        AnnotationError: a key is missing, a label does not have eight fields, an event is a duplicate, out of order or
            out of range, or a video occurs twice. The message counts all problems and shows the first ones.
    """
    rallies, problems = read_f3set(path)
    if problems:
        shown = "\n  ".join(problems[:MAX_PROBLEMS_SHOWN])
        more = f"\n  and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise AnnotationError(
            f"{path}: {format_count(len(problems), 'problem')}:\n  {shown}{more}\n"
            "`mmdistill check-data ANNOTATIONS --write-clean FILE` writes a copy without them"
        )
    if not rallies:
        raise AnnotationError(f"{path}: contains no rally; give a file with at least one")
    return rallies


@register_annotation_format("f3set")
def _load(path: Path, _frames_dir: Path | None, _frame_number_offset: int) -> list[Rally]:
    return load_f3set(path)


def read_f3set(path: Path | str) -> tuple[list[Rally], list[str]]:
    """The valid rallies of an F3Set JSON file with their valid events in order, and all problems of the others.

    The text of a problem names the rally and, by its position in the rally, the event.

    Raises:
        AnnotationError: the file is not a JSON list.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: expected a JSON list of rallies, got {type(entries).__name__}")
    rallies: dict[str, Rally] = {}
    problems: list[str] = []
    for number, entry in enumerate(entries):
        name = entry.get("video") if isinstance(entry, dict) else None
        name = name if isinstance(name, str) and name else f"rally {number}"
        found = [f"{name}: {problem}" for problem in _rally_problems(entry)]
        if name in rallies:
            found.append(f"{name}: this video occurs twice")
        if not found:
            events, found = _parse_events(name, entry["events"], entry["num_frames"])
            rallies[name] = Rally(name, entry["num_frames"], float(entry["fps"]), events)
        problems += found
    return list(rallies.values()), problems


def _rally_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"expected a JSON object, got {type(entry).__name__}"
        return
    missing = [key for key in ("video", "num_frames", "fps", "events") if key not in entry]
    yield from (f"the key {key!r} is missing" for key in missing)
    if missing:
        return
    if not is_safe_name(entry["video"]):
        yield f"video={entry['video']!r} is not a file name"
    if not is_integer(entry["num_frames"]) or entry["num_frames"] < 1:
        yield f"num_frames={entry['num_frames']!r} is not a count of frames"
    fps = entry["fps"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        yield f"fps={fps!r} is not a frame rate"
    if not isinstance(entry["events"], list):
        yield "events is not a list"


def _parse_events(rally: str, entries: list[Any], num_frames: int) -> tuple[tuple[Event, ...], list[str]]:
    """The valid events sorted by frame, and the problems of the others."""
    events: list[Event] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        message = _event_problem(entry, num_frames)
        if not message:
            event = Event(entry["frame"], entry["label"])
            last = max((e.frame for e in events), default=-1)
            if event in events:
                message = f"a duplicate of frame {event.frame}, {event.label}"
            else:
                events.append(event)
                if event.frame < last:  # the event is valid, the order of the file is not
                    message = f"frame {event.frame} comes after frame {last}: out of order"
        if message:
            problems.append(f"{rally}, event {number}: {message}")
    return tuple(sorted(events, key=lambda e: e.frame)), problems


def _event_problem(entry: Any, num_frames: int) -> str:
    """The problem of one event; "" if there is none."""
    if not isinstance(entry, dict):
        return f"expected a JSON object, got {type(entry).__name__}"
    for key in ("frame", "label"):
        if key not in entry:
            return f"the key {key!r} is missing"
    frame, label = entry["frame"], entry["label"]
    if not is_integer(frame):
        return f"frame={frame!r} is not an integer"
    if not 0 <= frame < num_frames:
        return f"frame={frame} is out of range, the rally has frames 0 to {num_frames - 1}"
    if not isinstance(label, str):
        return f"label={label!r} is not text"
    count = len(label.split("_"))
    if count != len(F3SET_FIELDS):
        fields = f"{len(F3SET_FIELDS)} ({', '.join(F3SET_FIELDS)})"
        return f"label={label!r} has {format_count(count, 'field')}, not {fields}"
    return ""


def check_label_fields(fields: Sequence[str]) -> None:
    """Raise `ValueError` if there is no field, or one that F3Set does not have."""
    if not fields or not set(fields) <= set(F3SET_FIELDS):
        raise ValueError(f"label_fields={list(fields)}: choose among {', '.join(F3SET_FIELDS)}")


def select_fields(label: str, fields: Sequence[str] | None) -> str:
    """A label reduced to the named F3Set fields, in F3Set's order, joined by ``_``. None keeps all.

    Raises:
        ValueError: a field is unknown, or the label does not have eight fields.
    """
    if fields is None:
        return label
    check_label_fields(fields)
    parts = label.split("_")
    if len(parts) != len(F3SET_FIELDS):
        raise ValueError(
            f"label {label!r} has {format_count(len(parts), 'field')}, label_fields needs {len(F3SET_FIELDS)}"
        )
    return "_".join(part for part, name in zip(parts, F3SET_FIELDS, strict=True) if name in fields)


def match_name(video: str) -> str:
    """The match of an F3Set rally: the video's name without the numbers of its first and last frame."""
    parts = video.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit() else video


def to_json(rallies: Sequence[Rally]) -> list[dict[str, Any]]:
    """Rallies as F3Set JSON entries, with the keys that this package reads."""
    return [
        {
            "video": r.video,
            "num_frames": r.num_frames,
            "fps": r.fps,
            "events": [{"frame": e.frame, "label": e.label} for e in r.events],
        }
        for r in rallies
    ]
