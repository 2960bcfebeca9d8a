"""The annotation format ``clips`` of MM-CDFSL: EPIC-Kitchens, MECCANO, WEAR (targets) and Ego4D (source)."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdistill.data.annotations.base import (
    AnnotationError,
    Event,
    Rally,
    is_integer,
    is_safe_name,
    read_json,
    register_annotation_format,
)
from mmdistill.errors import format_count

UNKNOWN_FPS = 30.0  # the format stores no frame rate, and nothing depends on it

# Names of a field in the four datasets. The first one that a clip has is used.
_START = ("start_frame", "clip_frame")
_ACTION = ("action_idx", "label_id")
_NAME = ("action_name", "action", "label")


@dataclass
class _Video:
    """What the clips of one video say about it."""

    events: list[Event] = field(default_factory=list)
    length: int = 0  # 0: unknown


@register_annotation_format("clips")
def load_clips(path: Path, frames_dir: Path | None, frame_number_offset: int) -> list[Rally]:
    """The rallies of a JSON object with a list ``clips``.

    A clip has:

    - the folder of its frames: ``clip_uid``, else ``participant_id/video_id``, else ``video_id``;
    - its first frame: ``start_frame`` or ``clip_frame``, numbered like the file names;
    - if it is labeled, its action: ``action_idx`` or ``label_id``, else the pair ``verb_label``, ``noun_label``.

    The clips of one folder become the events of one rally, each at the clip's first frame: use ``clip_anchor: start``.
    The label is the action's number, preceded by the action's name if all its clips have the same name. A clip without
    an action becomes an event without a label, so ``train_clips: events`` uses exactly the listed parts of the videos.
    The length of a video is ``num_frames`` of its clips, which must agree. If no clip has it, the frames are counted.

    Raises:
        AnnotationError: names the clip by its position in the list, and the field.
    """
    content = read_json(path)
    clips = content.get("clips") if isinstance(content, dict) else None
    if not isinstance(clips, list) or not clips:
        raise AnnotationError(f"{path}: expected an object with a list 'clips' of at least one clip")
    videos: dict[str, _Video] = {}
    names: dict[str, set[str]] = {}  # of the action of each label
    for number, clip in enumerate(clips):
        where = f"{path}: clip {number}"
        name = _video_name(where, clip)
        where = f"{where} ({name})"
        video, event = videos.setdefault(name, _Video()), _parse_event(where, clip, frame_number_offset)
        if event in video.events:
            what = f"{event.label} at {event.frame}" if event.label else f"frame {event.frame}"
            raise AnnotationError(f"{where} is a duplicate: {what}")
        video.events.append(event)
        action = _first_value(clip, _NAME)
        names.setdefault(event.label, set()).add(action if isinstance(action, str) else "")
        if "num_frames" in clip:
            length = _parse_number(where, "num_frames", clip["num_frames"])
            if video.length not in (0, length):
                raise AnnotationError(
                    f"{where}: num_frames={length}, an earlier clip of this video has {video.length}; num_frames is "
                    "the length of the video, in frames"
                )
            video.length = length
    classes = {label: _class_name(label, found) for label, found in names.items()}
    rallies = []
    for name, video in videos.items():
        length = video.length or _count_frames(path, name, frames_dir)
        events = sorted((Event(e.frame, classes[e.label]) for e in video.events), key=lambda e: (e.frame, e.label))
        if events[-1].frame >= length:
            raise AnnotationError(
                f"{path}: {name}: frame {events[-1].frame} is out of range, the video has "
                f"{format_count(length, 'frame')}"
            )
        rallies.append(Rally(name, length, UNKNOWN_FPS, tuple(events)))
    return rallies


def _video_name(where: str, clip: Any) -> str:
    if not isinstance(clip, dict):
        raise AnnotationError(f"{where}: expected an object, got {type(clip).__name__}")
    video = clip.get("clip_uid") or clip.get("video_id")
    if "clip_uid" not in clip and "participant_id" in clip:
        video = f"{clip['participant_id']}/{video}"
    if not is_safe_name(video):
        raise AnnotationError(f"{where}: clip_uid or video_id is not a file name (got {video!r})")
    return str(video)


def _parse_event(where: str, clip: dict[str, Any], frame_number_offset: int) -> Event:
    """The event's label is the action's number."""
    start = _first_value(clip, _START)
    if start is None:
        raise AnnotationError(f"{where}: the key 'start_frame' is missing")
    frame = max(0, _parse_number(where, "start_frame", start) - frame_number_offset)
    action = _first_value(clip, _ACTION)
    if action is not None:
        return Event(frame, str(_parse_number(where, "action_idx", action)))
    if "verb_label" in clip and "noun_label" in clip:
        return Event(frame, "-".join(str(_parse_number(where, k, clip[k])) for k in ("verb_label", "noun_label")))
    return Event(frame, "")


def _class_name(label: str, names: set[str]) -> str:
    """``name (number)``, or the number alone if the clips of the class have different names."""
    name = next(iter(names)) if len(names) == 1 else ""
    return f"{name} ({label})" if label and name else label


def _first_value(clip: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((clip[key] for key in keys if clip.get(key) is not None), None)


def _parse_number(where: str, key: str, value: Any) -> int:
    """A count or class number from 0. Some files store them as text."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not is_integer(value) or value < 0:
        raise AnnotationError(f"{where}: {key}={value!r} is not a number from 0")
    return int(value)


def _count_frames(path: Path, video: str, frames_dir: Path | None) -> int:
    folder = None if frames_dir is None else frames_dir / video
    files = os.listdir(folder) if folder is not None and folder.is_dir() else []
    count = sum(name.lower().endswith((".jpg", ".jpeg")) for name in files)
    if not count:
        raise AnnotationError(
            f"{path}: cannot determine the length of {video}: its clips have no num_frames, and there are no frames "
            f"under {frames_dir or 'data_module.frames_dir'}"
        )
    return count
