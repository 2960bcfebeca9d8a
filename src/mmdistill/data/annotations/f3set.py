"""The annotation format of F3Set (ICLR 2025, arXiv 2504.08222).

A JSON list of rallies with `video`, `num_frames`, `fps` and `events` (`frame`, `label`). A label is any text; its
fields are joined by ``_``. Labels of F3Set's tennis data have eight fields. Frames are counted from 0. Optional keys
are the names and hands of the players: `near_name`, `near_hand`, `far_name`, `far_hand`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdistill.console import log_once
from mmdistill.data.annotations.base import (
    UNKNOWN_FPS,
    AnnotationError,
    Event,
    Player,
    Rally,
    frame_rate,
    is_safe_name,
    keys_that_may_be_classes,
    read_json,
    register_annotation_format,
    require_valid,
    whole_number,
)
from mmdistill.errors import format_count, format_first

F3SET_FIELDS: tuple[str, ...] = ("player", "court", "type", "side", "technique", "direction", "approach", "outcome")
# Values of `label_fields`: names, for labels with these eight fields, and positions from 0, for any label.
LABEL_FIELDS: tuple[str, ...] = (*F3SET_FIELDS, *map(str, range(12)))
_SIDES = ("far", "near")  # of the court; keys SIDE_name and SIDE_hand, and fields of `Rally`
_PLAYER_KEYS = tuple(f"{side}_{key}" for side in _SIDES for key in ("name", "hand"))


def load_f3set(path: Path | str) -> list[Rally]:
    """The rallies of an F3Set JSON file, in the order of the file.

    Raises:
        InvalidEntriesError: a key is missing, an event is a duplicate, out of order or out of range, or a video occurs
            twice. The message counts all problems and shows the first ones.
    """
    return require_valid(path, *read_f3set(path))


@register_annotation_format("f3set")
def _load(path: Path, _frames_dir: Path | None, _frame_number_offset: int) -> list[Rally]:
    return load_f3set(path)


def read_f3set(path: Path | str) -> tuple[list[Rally], list[str]]:
    """The valid rallies of an F3Set JSON file with their valid events in order, and all problems of the others.

    If no event has a label, all events are read without a label. The text of a problem names the rally and, by its
    position in the rally, the event.

    Raises:
        AnnotationError: the file is not a JSON list, or its events have other keys instead of ``label``.
    """
    try:
        entries = read_json(path)
    except AnnotationError as error:
        raise AnnotationError(f"{error}; F3Set JSON is needed, a list of rallies") from error
    if not isinstance(entries, list):
        clips = isinstance(entries, dict) and "clips" in entries
        hint = (
            "; commands with a dataset config read a file with 'clips' if data_module.annotations=clips"
            if clips
            else ""
        )
        raise AnnotationError(f"{path}: expected a JSON list of rallies, got {type(entries).__name__}{hint}")
    is_labeled = _has_labels(path, entries)
    rallies: dict[str, Rally] = {}
    problems: list[str] = []
    if without_rate := sum(isinstance(entry, dict) and entry.get("fps") is None for entry in entries):
        log_once(f"{path}: {format_count(without_rate, 'rally')} without fps, their frame rate is unknown")
    _report_other_players(path, entries)
    for number, entry in enumerate(entries):
        name = entry.get("video") if isinstance(entry, dict) else None
        name = name if isinstance(name, str) and name else f"rally {number}"
        found = [f"{name}: {problem}" for problem in _rally_problems(entry)]
        if name in rallies:
            found.append(f"{name}: this video occurs twice")
        if not found:
            num_frames = whole_number(entry["num_frames"]) or 0
            fps = frame_rate(entry.get("fps")) or UNKNOWN_FPS
            events, found = _parse_events(name, entry["events"], num_frames, is_labeled=is_labeled)
            rallies[name] = Rally(name, num_frames, fps, events, **_players(entry))
        problems += found
    _report_other_labels(path, [event.label for rally in rallies.values() for event in rally.events])
    return list(rallies.values()), problems


def _players(entry: dict[str, Any]) -> dict[str, Player]:
    """The players of a rally, by side of the court. Spaces around names are removed."""
    texts = {key: str(entry[key]).strip() if _is_text(entry.get(key)) else "" for key in _PLAYER_KEYS}
    return {side: Player(texts[f"{side}_name"], texts[f"{side}_hand"]) for side in _SIDES}


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _report_other_players(path: Path | str, entries: list[Any]) -> None:
    """Log the rallies whose players are neither text nor absent, such as lists of names."""
    found = [
        key
        for entry in entries
        if isinstance(entry, dict)
        for key in _PLAYER_KEYS
        if entry.get(key) is not None and not _is_text(entry[key])
    ]
    if found:
        log_once(
            f"{path}: {format_count(len(found), 'value')} of {found[0]} or a similar key are no text: unknown player"
        )


def _report_other_labels(path: Path | str, labels: list[str]) -> None:
    """Log the labels without F3Set's eight fields if most labels of the file have them: they may be typing errors."""
    others = [label for label in labels if len(label.split("_")) != len(F3SET_FIELDS)]
    if 0 < len(others) < len(labels) / 2:
        log_once(
            f"{path}: {len(others)} of {format_count(len(labels), 'event')} with a label of another number of fields "
            f"than {len(F3SET_FIELDS)}: {format_first(sorted(set(others)), 3)}"
        )


def _has_labels(path: Path | str, entries: list[Any]) -> bool:
    """Whether any event has a label. Raises `AnnotationError` if the labels seem to have another key."""
    lists = [entry.get("events") for entry in entries if isinstance(entry, dict)]
    events = [event for found in lists if isinstance(found, list) for event in found if isinstance(event, dict)]
    if any(event.get("label") not in (None, "") for event in events):
        return True
    if keys := [key for key in keys_that_may_be_classes(events) if key != "label"]:
        raise AnnotationError(
            f"{path}: no event has the key 'label', but the events have {', '.join(keys)}; rename the key of the class "
            "to 'label', or remove these keys from a file without labels"
        )
    return False


def _rally_problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"expected a JSON object, got {type(entry).__name__}"
        return
    missing = [key for key in ("video", "num_frames", "events") if key not in entry]
    yield from (f"the key {key!r} is missing" for key in missing)
    if missing:
        return
    if not is_safe_name(entry["video"]):
        yield f"video={entry['video']!r} is not a file name"
    if (whole_number(entry["num_frames"]) or 0) < 1:
        yield f"num_frames={entry['num_frames']!r} is not a count of frames"
    if frame_rate(entry.get("fps")) is None:
        yield f"fps={entry['fps']!r} is not a frame rate; use a number, or -1 if it is unknown"
    if not isinstance(entry["events"], list):
        yield "events is not a list"


def _parse_events(
    rally: str, entries: list[Any], num_frames: int, *, is_labeled: bool
) -> tuple[tuple[Event, ...], list[str]]:
    """The valid events sorted by frame, and the problems of the others."""
    events: list[Event] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        message = _event_problem(entry, num_frames, is_labeled=is_labeled)
        if not message:
            event = Event(whole_number(entry["frame"]) or 0, str(entry["label"]) if is_labeled else "")
            last = max((e.frame for e in events), default=-1)
            if event in events:
                message = f"a duplicate of frame {event.frame}{', ' * is_labeled}{event.label}"
            else:
                events.append(event)
                if event.frame < last:  # the event is valid, the order of the file is not
                    message = f"frame {event.frame} comes after frame {last}: out of order"
        if message:
            problems.append(f"{rally}, event {number}: {message}")
    return tuple(sorted(events, key=lambda e: e.frame)), problems


def _event_problem(entry: Any, num_frames: int, *, is_labeled: bool) -> str:
    """The problem of one event; "" if there is none."""
    if not isinstance(entry, dict):
        return f"expected a JSON object, got {type(entry).__name__}"
    for key in ("frame", "label") if is_labeled else ("frame",):
        if entry.get(key) in (None, ""):
            return f"the key {key!r} is missing" if key not in entry else f"the key {key!r} has no value"
    frame, label = whole_number(entry["frame"]), entry.get("label", "")
    if frame is None:
        return f"frame={entry['frame']!r} is not an integer"
    if not 0 <= frame < num_frames:
        return f"frame={frame} is out of range, the rally has frames 0 to {num_frames - 1}"
    if is_labeled and not isinstance(label, str) and (not isinstance(label, int) or isinstance(label, bool)):
        return f"label={label!r} is not text"
    return ""


def check_label_fields(fields: Sequence[str]) -> None:
    """Raise `ValueError` if there is no field, or one that is not in `LABEL_FIELDS`."""
    if not fields or not set(fields) <= set(LABEL_FIELDS):
        raise ValueError(f"label_fields={list(fields)}: choose among {', '.join(LABEL_FIELDS)}")


def select_fields(label: str, fields: Sequence[str] | None) -> str:
    """A label reduced to these fields of `LABEL_FIELDS`, in the order of the label, joined by ``_``. None keeps all.

    Raises:
        ValueError: a field is unknown, or the label does not have it. Names need a label with the eight fields.
    """
    if fields is None:
        return label
    check_label_fields(fields)
    parts = label.split("_")
    found = f"label {label!r} has {format_count(len(parts), 'field')}"
    if len(parts) != len(F3SET_FIELDS) and set(fields) & set(F3SET_FIELDS):
        raise ValueError(
            f"{found}, but label_fields={list(fields)} names fields of labels with {len(F3SET_FIELDS)}; give positions "
            "such as label_fields=[0,1], or label_fields=null for whole labels"
        )
    positions = sorted({int(f) if f.isdecimal() else F3SET_FIELDS.index(f) for f in fields})
    if positions[-1] >= len(parts):
        raise ValueError(f"{found}, so label_fields={list(fields)} cannot select position {positions[-1]} (from 0)")
    return "_".join(parts[position] for position in positions)


def match_name(video: str) -> str:
    """The match of an F3Set rally: the video's name without the numbers of its first and last frame."""
    parts = video.rsplit("_", 2)
    return parts[0] if len(parts) == 3 and parts[1].isdigit() and parts[2].isdigit() else video


def to_json(rallies: Sequence[Rally]) -> list[dict[str, Any]]:
    """Rallies as F3Set JSON entries with the keys that this package reads.

    `label` only of events that have one, and names and hands of players only if they are known.
    """
    return [
        {
            "video": r.video,
            "num_frames": r.num_frames,
            "fps": r.fps,
            **{f"{side}_{key}": text for side in _SIDES for key, text in vars(getattr(r, side)).items() if text},
            "events": [{"frame": e.frame, **({"label": e.label} if e.label else {})} for e in r.events],
        }
        for r in rallies
    ]
