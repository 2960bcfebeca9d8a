"""The annotation format of F3Set (ICLR 2025, arXiv 2504.08222).

A JSON list of rallies with `video`, `num_frames`, `fps` and `events` (`frame`, `label`). A label has eight fields,
joined by ``_``. Frames are counted from 0.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdistill.data.annotations.base import (
    MAX_PROBLEMS_SHOWN,
    AnnotationError,
    Event,
    Problem,
    Rally,
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
        shown = "\n  ".join(str(p) for p in problems[:MAX_PROBLEMS_SHOWN])
        more = f"\n  and {len(problems) - MAX_PROBLEMS_SHOWN} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        raise AnnotationError(
            f"{path}: {format_count(len(problems), 'problem')}:\n  {shown}{more}\n"
            "`mmdistill check-data ANNOTATIONS --write-clean FILE` writes a copy without them"
        )
    if not rallies:
        raise AnnotationError(f"{path}: contains no rally; give a file with at least one")
    return rallies


def read_f3set(path: Path | str) -> tuple[list[Rally], list[Problem]]:
    """The valid rallies of an F3Set JSON file with their valid events in order, and all problems of the others.

    Raises:
        AnnotationError: the file is not a JSON list.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise AnnotationError(f"{path}: expected a JSON list of rallies, got {type(entries).__name__}")
    rallies: list[Rally] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, entry in enumerate(entries):
        name = entry.get("video") if isinstance(entry, dict) else None
        name = name if isinstance(name, str) and name else f"rally {number}"
        found = _find_rally_problems(name, entry, seen)
        problems += found
        if found:
            continue
        seen.add(name)
        events, event_problems = _parse_events(name, entry["events"], entry["num_frames"])
        problems += event_problems
        rallies.append(Rally(name, entry["num_frames"], float(entry["fps"]), events))
    return rallies, problems


def _find_rally_problems(name: str, entry: Any, seen: set[str]) -> list[Problem]:
    if not isinstance(entry, dict):
        return [Problem(name, None, f"expected a JSON object, got {type(entry).__name__}")]
    missing = [key for key in ("video", "num_frames", "fps", "events") if key not in entry]
    if missing:
        return [Problem(name, None, f"the key {key!r} is missing") for key in missing]
    found = []
    if not isinstance(entry["video"], str) or not is_safe_name(entry["video"]):
        found.append(Problem(name, None, f"video={entry['video']!r} is not a file name"))
    if not _is_integer(entry["num_frames"]) or entry["num_frames"] < 1:
        found.append(Problem(name, None, f"num_frames={entry['num_frames']!r} is not a count of frames"))
    fps = entry["fps"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not math.isfinite(fps) or fps <= 0:
        found.append(Problem(name, None, f"fps={fps!r} is not a frame rate"))
    if not isinstance(entry["events"], list):
        found.append(Problem(name, None, "events is not a list"))
    if name in seen:
        found.append(Problem(name, None, "this video occurs twice"))
    return found


def _parse_events(rally: str, entries: list[Any], num_frames: int) -> tuple[tuple[Event, ...], list[Problem]]:
    """The valid events sorted by frame, and the problems of the others."""
    events: list[Event] = []
    problems: list[Problem] = []
    last = -1
    for number, entry in enumerate(entries):
        message = _check_event(entry, num_frames)
        if not message:
            frame, label = entry["frame"], entry["label"]
            if Event(frame, label) in events:
                message = f"a duplicate of frame {frame}, {label}"
            else:
                if frame < last:  # the event is valid, the order of the file is not
                    problems.append(Problem(rally, number, f"frame {frame} comes after frame {last}: out of order"))
                events.append(Event(frame, label))
                last = max(last, frame)
        if message:
            problems.append(Problem(rally, number, message))
    return tuple(sorted(events, key=lambda e: e.frame)), problems


def _check_event(entry: Any, num_frames: int) -> str:
    """The problem of one event; "" if there is none."""
    if not isinstance(entry, dict):
        return f"expected a JSON object, got {type(entry).__name__}"
    for key in ("frame", "label"):
        if key not in entry:
            return f"the key {key!r} is missing"
    frame, label = entry["frame"], entry["label"]
    if not _is_integer(frame):
        return f"frame={frame!r} is not an integer"
    if not 0 <= frame < num_frames:
        return f"frame={frame} is out of range, the rally has frames 0 to {num_frames - 1}"
    if not isinstance(label, str):
        return f"label={label!r} is not text"
    count = len(label.split("_"))
    if count != len(F3SET_FIELDS):
        return (
            f"label={label!r} has {format_count(count, 'field')}, not {len(F3SET_FIELDS)} ({', '.join(F3SET_FIELDS)})"
        )
    return ""


def select_fields(label: str, fields: Sequence[str] | None) -> str:
    """A label reduced to the named F3Set fields, in F3Set's order, joined by ``_``. None keeps all.

    Raises:
        ValueError: a field is unknown, or the label does not have eight fields.
    """
    if fields is None:
        return label
    unknown = [f for f in fields if f not in F3SET_FIELDS]
    if unknown or not fields:
        raise ValueError(f"label_fields={list(fields)}: choose among {', '.join(F3SET_FIELDS)}")
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


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@register_annotation_format("f3set")
def _load(path: Path, _frames_dir: Path | None, _frame_number_offset: int) -> list[Rally]:
    return load_f3set(path)
