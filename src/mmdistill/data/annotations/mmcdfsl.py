"""The annotation format ``clips`` of MM-CDFSL: EPIC-Kitchens, MECCANO, WEAR (targets) and Ego4D (source)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdistill.console import log_once
from mmdistill.data.annotations.base import (
    UNKNOWN_FPS,
    AnnotationError,
    Event,
    Rally,
    is_safe_name,
    keys_that_may_be_classes,
    read_json,
    register_annotation_format,
    require_valid,
    whole_number,
)
from mmdistill.data.readers.base import list_files
from mmdistill.errors import format_count

# Names of a field in the datasets. The first one that a clip has is used.
_START = ("start_frame", "clip_frame")
_NAME = ("action_name", "action", "label", "class_name")
# Keys of the class. The first entry whose keys any clip has is used for all clips of the file.
_CLASS_KEYS = (
    ("action_idx",), ("action_id",), ("label_id",), ("class_id",),
    ("verb_label", "noun_label"), ("verb_class", "noun_class"),
    ("label",), ("class",), ("action_name",), ("action",), ("class_name",), ("verb", "noun"),
)  # fmt: skip


@dataclass
class _Video:
    """What the clips of one video say about it."""

    events: set[Event] = field(default_factory=set)
    num_clips: int = 0
    length: int = 0  # 0: unknown

    def add(self, event: Event, clip: dict[str, Any]) -> None:
        """Add a clip. Raises `ValueError` if the length of the video differs from that of another clip."""
        if clip.get("num_frames") is not None:
            length = _parse_number("num_frames", clip["num_frames"])
            if self.length not in (0, length):
                raise ValueError(
                    f"num_frames={length}, an earlier clip of this video has {self.length}; num_frames is the length "
                    "of the video, in frames"
                )
            self.length = length
        self.events.add(event)
        self.num_clips += 1


@register_annotation_format("clips")
def load_clips(path: Path, frames_dir: Path | None, frame_number_offset: int) -> list[Rally]:
    """The rallies of a JSON object with a list ``clips``.

    A clip has:

    - the folder of its frames: ``clip_uid``, else ``participant_id/video_id``, else ``video_id``;
    - its first frame: ``start_frame`` or ``clip_frame``, numbered like the file names;
    - if it is labeled, its class: a number (``action_idx``, ``action_id``, ``label_id``), a pair (``verb_label`` and
      ``noun_label``, ``verb_class`` and ``noun_class``) or a name (``label``, ``action_name``).

    The clips of one folder become the events of one rally, each at the clip's first frame: use ``clip_anchor: start``.
    Clips with the same folder, first frame and class are one event; the log counts them. The label is the class's
    number, preceded by the action's name if all its clips have the same name. If no clip has a class, each becomes an
    event without a label, so ``train_clips: events`` uses exactly the listed parts of the videos. The length of a video
    is ``num_frames`` of its clips, which must agree. If no clip has it, the frames are counted.

    Raises:
        InvalidEntriesError: names each invalid clip by its position in the list, and the field.
        AnnotationError: there is no clip, or the clips have unknown keys instead of a class.
    """
    content = read_json(path)
    clips = content.get("clips") if isinstance(content, dict) else None
    if not isinstance(clips, list) or not clips:
        raise AnnotationError(f"{path}: expected an object with a list 'clips' of at least one clip")
    class_keys = _find_class_keys(path, clips)
    videos: dict[str, _Video] = {}
    names: dict[str, set[str]] = {}  # of the action of each label
    problems: list[str] = []
    for number, clip in enumerate(clips):
        name = ""
        try:
            name = _video_name(clip)
            event = _parse_event(clip, class_keys, frame_number_offset)
            videos.setdefault(name, _Video()).add(event, clip)
        except ValueError as error:
            problems.append(f"clip {number}{f' ({name})' if name else ''}: {error}")
            continue
        action = _first_value(clip, _NAME)
        names.setdefault(event.label, set()).add(action if isinstance(action, str) else "")
    if repeats := sum(video.num_clips - len(video.events) for video in videos.values()):
        same = "video, first frame and class" if class_keys else "video and first frame"
        log_once(f"{path}: {format_count(repeats, 'clip')} with the {same} of another clip, each taken once")
    classes = {label: _class_name(label, found) for label, found in names.items()}
    rallies = []
    for name, video in videos.items():
        length = video.length or _count_frames(name, frames_dir)
        if not length:
            problems.append(
                f"cannot determine the length of {name}: its clips have no num_frames, and there are no frames "
                f"under {frames_dir or 'data_module.frames_dir'}"
            )
            continue
        events = sorted((Event(e.frame, classes[e.label]) for e in video.events), key=lambda e: (e.frame, e.label))
        problems += [
            f"{name}: frame {event.frame} is out of range, the video has {format_count(length, 'frame')}"
            for event in events
            if event.frame >= length
        ]
        rallies.append(Rally(name, length, UNKNOWN_FPS, tuple(event for event in events if event.frame < length)))
    return require_valid(path, rallies, problems)


def _find_class_keys(path: Path, clips: list[Any]) -> tuple[str, ...]:
    """The keys of the class of each clip; none if the file has no labels.

    Raises:
        AnnotationError: no clip has a known key of a class, but the clips have other keys that may be one.
    """
    entries = [clip for clip in clips if isinstance(clip, dict)]
    for keys in _CLASS_KEYS:
        if any(all(clip.get(key) not in (None, "") for key in keys) for clip in entries):
            return keys
    if unknown := keys_that_may_be_classes(entries):
        known = ", ".join(" and ".join(keys) for keys in _CLASS_KEYS)
        raise AnnotationError(
            f"{path}: no clip has a known key of a class ({known}), but the clips have {', '.join(unknown)}; rename "
            "the key of the class to 'label', or remove these keys from a file without labels"
        )
    return ()


def _video_name(clip: Any) -> str:
    if not isinstance(clip, dict):
        raise ValueError(f"expected an object, got {type(clip).__name__}")
    video = clip.get("clip_uid") or clip.get("video_id")
    if "clip_uid" not in clip and "participant_id" in clip:
        video = f"{clip['participant_id']}/{video}"
    if not is_safe_name(video):
        raise ValueError(f"clip_uid or video_id is not a file name (got {video!r})")
    return str(video)


def _parse_event(clip: dict[str, Any], class_keys: tuple[str, ...], frame_number_offset: int) -> Event:
    """The event's label is the number or the text of the class."""
    start = _first_value(clip, _START)
    if start is None:
        raise ValueError("the key 'start_frame' is missing")
    frame = max(0, _parse_number("start_frame", start) - frame_number_offset)
    return Event(frame, "-".join(_parse_class(key, clip.get(key)) for key in class_keys))


def _parse_class(key: str, value: Any) -> str:
    if value in (None, ""):
        raise ValueError(f"the key {key!r} of the class has no value, but other clips of the file have one")
    if isinstance(value, str) and not key.endswith(("_idx", "_id")):
        return value
    return str(_parse_number(key, value))


def _class_name(label: str, names: set[str]) -> str:
    """``name (number)``, or the number alone if the clips of the class have different names."""
    name = next(iter(names)) if len(names) == 1 else ""
    return f"{name} ({label})" if label and name not in ("", label) else label


def _first_value(clip: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((clip[key] for key in keys if clip.get(key) is not None), None)


def _parse_number(key: str, value: Any) -> int:
    """A count or class number from 0. Some files store them as text."""
    number = whole_number(value)
    if number is None or number < 0:
        raise ValueError(f"{key}={value!r} is not a number from 0")
    return number


def _count_frames(video: str, frames_dir: Path | None) -> int:
    files = [] if frames_dir is None else list_files(str(frames_dir / video), "rgb")
    return sum(name.lower().endswith((".jpg", ".jpeg")) for name in files)
