"""Annotation files of other datasets, by name.

A new dataset is a YAML file and, where its annotations have a format of their own, one small reader: a function of the
annotation file, the frames' folder and the number of the first frame, registered with `annotation_reader`.
"""

import os
from pathlib import Path
from typing import Any

from mmdistill.data.annotations.base import AnnotationError, Event, Rally, annotation_reader, is_safe_name, read_json

UNKNOWN_FPS = 30.0  # these formats give no rate, and nothing depends on it


# How the formats call a field; the first that a clip has counts.
_START = ("start_frame", "clip_frame")
_ACTION = ("action_idx", "label_id")
_NAME = ("action_name", "action", "label")


@annotation_reader("clips")
def load_clips(path: Path, frames_dir: Path | None, frame_number_offset: int) -> list[Rally]:
    """JSON with ``clips[]``, as MM-CDFSL has it for EPIC-Kitchens, MECCANO, WEAR (targets) and Ego4D (source).

    A clip names its frames' folder (``clip_uid``, else ``participant_id`` / ``video_id``, else ``video_id``), where it
    starts (``start_frame`` or ``clip_frame``, as numbered in the file names) and, where it is labelled, its action:
    ``action_idx`` or ``label_id``, else the pair ``verb_label``, ``noun_label``. Clips of one folder become the events
    of one rally, at their start: use ``clip_anchor: start``. The label is the number, after the action's name where
    all its clips give the same one; clips without an action are events without a label, so that ``train_clips:
    events`` takes the listed parts of the videos and no others.

    The length of a video is ``num_frames`` of its clips, which must agree, else what the frames folder holds.

    Raises:
        AnnotationError: naming the clip by its position and the field.
    """
    content = read_json(path)
    clips = content.get("clips") if isinstance(content, dict) else None
    if not isinstance(clips, list) or not clips:
        raise AnnotationError(f"{path}: expected an object with a list 'clips' of at least one clip")
    events: dict[str, list[Event]] = {}
    lengths: dict[str, int] = {}
    names: dict[str, set[str]] = {}
    for number, clip in enumerate(clips):
        video, event = _clip_event(f"{path}: clip {number}", clip, frame_number_offset)
        known = events.setdefault(video, [])
        if event in known:
            what = f"{event.label} at {event.frame}" if event.label else f"frame {event.frame}"
            raise AnnotationError(f"{path}: clip {number} ({video}) is a duplicate: {what}")
        known.append(event)
        name = _first(clip, _NAME)
        names.setdefault(event.label, set()).add(name if isinstance(name, str) else "")
        if "num_frames" in clip:
            length = _number(f"{path}: clip {number} ({video})", "num_frames", clip["num_frames"])
            if lengths.setdefault(video, length) != length:
                raise AnnotationError(
                    f"{path}: clip {number} ({video}): num_frames={length}, an earlier clip of this video says "
                    f"{lengths[video]}; it is the length of the video, in frames"
                )
    shown = {label: _shown(label, told) for label, told in names.items()}
    return [
        Rally(video, _length(path, video, found, lengths.get(video), frames_dir), UNKNOWN_FPS, _sorted(found, shown))
        for video, found in events.items()
    ]


def _clip_event(where: str, clip: Any, frame_number_offset: int) -> tuple[str, Event]:
    """(video, event), labelled by the action's number."""
    if not isinstance(clip, dict):
        raise AnnotationError(f"{where}: expected an object, got {type(clip).__name__}")
    video = clip.get("clip_uid") or clip.get("video_id")
    if "clip_uid" not in clip and "participant_id" in clip:
        video = f"{clip['participant_id']}/{video}"
    if not isinstance(video, str) or not is_safe_name(video):
        raise AnnotationError(f"{where}: clip_uid or video_id is not a file name (got {video!r})")
    where = f"{where} ({video})"
    start = _first(clip, _START)
    if start is None:
        raise AnnotationError(f"{where}: the key 'start_frame' is missing")
    frame = max(0, _number(where, "start_frame", start) - frame_number_offset)
    action = _first(clip, _ACTION)
    if action is not None:
        label = str(_number(where, "action_idx", action))
    elif "verb_label" in clip and "noun_label" in clip:
        label = "-".join(str(_number(where, key, clip[key])) for key in ("verb_label", "noun_label"))
    else:
        return video, Event(frame, "")
    return video, Event(frame, label)


def _shown(label: str, names: set[str]) -> str:
    """A class's name. Its number makes the class: of two names for one, neither is used."""
    name = next(iter(names)) if len(names) == 1 else ""
    return f"{name} ({label})" if label and name else label


def _first(clip: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((clip[key] for key in keys if clip.get(key) is not None), None)


def _number(where: str, key: str, value: Any) -> int:
    """A count or class number; some files have them as text."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise AnnotationError(f"{where}: {key}={value!r} is not a number from 0")
    return value


def _sorted(events: list[Event], shown: dict[str, str]) -> tuple[Event, ...]:
    return tuple(sorted((Event(e.frame, shown[e.label]) for e in events), key=lambda e: (e.frame, e.label)))


def _length(path: Path, video: str, events: list[Event], length: int | None, frames_dir: Path | None) -> int:
    if length is None and frames_dir is not None and (frames_dir / video).is_dir():
        length = sum(entry.name.lower().endswith((".jpg", ".jpeg")) for entry in os.scandir(frames_dir / video))
    if not length:
        raise AnnotationError(
            f"{path}: how long is {video}? Give num_frames in its clips, or frames under {frames_dir or 'frames_dir'}"
        )
    for event in events:
        if event.frame >= length:
            raise AnnotationError(f"{path}: {video}: frame {event.frame} is out of range, it has {length} frames")
    return length
