"""The annotation format ``clips`` of MM-CDFSL: EPIC-Kitchens, MECCANO, WEAR (targets) and Ego4D (source)."""

import os
from pathlib import Path
from typing import Any

from mmdistill.data.annotations.base import (
    AnnotationError,
    Event,
    Rally,
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
    events: dict[str, list[Event]] = {}
    lengths: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for number, clip in enumerate(clips):
        video, event = _parse_clip(f"{path}: clip {number}", clip, frame_number_offset)
        video_events = events.setdefault(video, [])
        if event in video_events:
            what = f"{event.label} at {event.frame}" if event.label else f"frame {event.frame}"
            raise AnnotationError(f"{path}: clip {number} ({video}) is a duplicate: {what}")
        video_events.append(event)
        name = _first_value(clip, _NAME)
        names.setdefault(event.label, set()).add(name if isinstance(name, str) else "")
        if "num_frames" in clip:
            length = _parse_number(f"{path}: clip {number} ({video})", "num_frames", clip["num_frames"])
            if lengths.setdefault(video, length) != length:
                raise AnnotationError(
                    f"{path}: clip {number} ({video}): num_frames={length}, an earlier clip of this video has "
                    f"{lengths[video]}; num_frames is the length of the video, in frames"
                )
    class_names = {label: _class_name(label, found) for label, found in names.items()}
    return [
        Rally(
            video,
            _video_length(path, video, found, lengths.get(video), frames_dir),
            UNKNOWN_FPS,
            _sort_events(found, class_names),
        )
        for video, found in events.items()
    ]


def _parse_clip(where: str, clip: Any, frame_number_offset: int) -> tuple[str, Event]:
    """(video, event). The event's label is the action's number."""
    if not isinstance(clip, dict):
        raise AnnotationError(f"{where}: expected an object, got {type(clip).__name__}")
    video = clip.get("clip_uid") or clip.get("video_id")
    if "clip_uid" not in clip and "participant_id" in clip:
        video = f"{clip['participant_id']}/{video}"
    if not isinstance(video, str) or not is_safe_name(video):
        raise AnnotationError(f"{where}: clip_uid or video_id is not a file name (got {video!r})")
    where = f"{where} ({video})"
    start = _first_value(clip, _START)
    if start is None:
        raise AnnotationError(f"{where}: the key 'start_frame' is missing")
    frame = max(0, _parse_number(where, "start_frame", start) - frame_number_offset)
    action = _first_value(clip, _ACTION)
    if action is not None:
        label = str(_parse_number(where, "action_idx", action))
    elif "verb_label" in clip and "noun_label" in clip:
        label = "-".join(str(_parse_number(where, key, clip[key])) for key in ("verb_label", "noun_label"))
    else:
        return video, Event(frame, "")
    return video, Event(frame, label)


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
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise AnnotationError(f"{where}: {key}={value!r} is not a number from 0")
    return value


def _sort_events(events: list[Event], class_names: dict[str, str]) -> tuple[Event, ...]:
    return tuple(sorted((Event(e.frame, class_names[e.label]) for e in events), key=lambda e: (e.frame, e.label)))


def _video_length(path: Path, video: str, events: list[Event], length: int | None, frames_dir: Path | None) -> int:
    if length is None and frames_dir is not None and (frames_dir / video).is_dir():
        length = sum(entry.name.lower().endswith((".jpg", ".jpeg")) for entry in os.scandir(frames_dir / video))
    if not length:
        raise AnnotationError(
            f"{path}: cannot determine the length of {video}: its clips have no num_frames, and there are no frames "
            f"under {frames_dir or 'data_module.frames_dir'}"
        )
    for event in events:
        if event.frame >= length:
            raise AnnotationError(
                f"{path}: {video}: frame {event.frame} is out of range, the video has {format_count(length, 'frame')}"
            )
    return length
