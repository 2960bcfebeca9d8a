"""Clips: the frames and the label of each sample, from rallies."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import select_fields


@dataclass(frozen=True)
class Clip:
    """One sample.

    Attributes:
        id: unique in its index. Everything random about the clip is seeded with it.
        video: name of the video in the files of every modality.
        frames: frame numbers, counted from 0.
        label: position in `ClipIndex.classes`; -1: no label.
        group: the recording. Few-shot episodes can keep support and query clips of one recording apart.
    """

    id: str
    video: str
    frames: tuple[int, ...]
    label: int
    group: str


@dataclass(frozen=True)
class ClipIndex:
    """Clips, their class names, and counts for the run's report (plain containers)."""

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _ClipSpec:
    """A clip before classes are numbered. `start` may lie outside the video."""

    id: str
    start: int
    label: str | None


def build_index(
    rallies: Sequence[Rally],
    *,
    clips: str,
    num_frames: int,
    sampling_rate: int = 1,
    stride: int | None = None,
    anchor: str = "center",
    label_fields: Sequence[str] | None = None,
    label: str = "event",
) -> ClipIndex:
    """All clips of `rallies`.

    A clip has `num_frames` frames, `sampling_rate` apart, within frames 0 to ``rally.num_frames - 2``. The last frame
    is excluded because flow k is the displacement from frame k to k + 1. A clip that would start before or end after
    the video is moved inside it, never padded. A video shorter than a clip has none and is listed in
    ``report["too_short"]``.

    Args:
        rallies: the videos and their events.
        clips: ``events`` (one clip per event), ``first`` (one clip per rally, for its first event), ``windows`` (one
            clip every `stride` frames, label -1 unless ``label="video"``).
        num_frames: frames per clip.
        sampling_rate: distance between frames of a clip.
        stride: frames between the starts of windows; None: the clip's span, so that windows do not overlap.
        anchor: position of the event in its clip: ``center`` (frame ``num_frames // 2`` of the clip) or ``start``.
        label_fields: F3Set fields that define the class; None: all.
        label: ``event``: the event's label is the class. ``video``: the video's name is the class.

    Raises:
        ValueError: an argument is invalid; names it.
    """
    _check_choices(clips=clips, anchor=anchor, label=label)
    _check_counts(num_frames=num_frames, sampling_rate=sampling_rate, stride=1 if stride is None else stride)
    span = (num_frames - 1) * sampling_rate + 1
    before = num_frames // 2 * sampling_rate if anchor == "center" else 0
    specs: list[tuple[Rally, _ClipSpec]] = []
    too_short, without_events, shifted = [], [], 0
    for rally in rallies:
        last_start = rally.num_frames - 1 - span
        if last_start < 0:
            too_short.append(rally.video)
            continue
        if clips == "windows":
            found = [_ClipSpec(f"{rally.video}:{s:06d}", s, None) for s in range(0, last_start + 1, stride or span)]
        else:
            found = _make_event_specs(rally, first_only=clips == "first", before=before)
            if not found:
                without_events.append(rally.video)
        for spec in found:
            start = min(max(spec.start, 0), last_start)
            shifted += start != spec.start
            event_label = select_fields(spec.label, label_fields) if spec.label else None
            specs.append((rally, _ClipSpec(spec.id, start, rally.video if label == "video" else event_label)))
    report = {"rallies": len(rallies), "shifted_into_video": shifted, "too_short": too_short}
    return _make_index(specs, range(0, span, sampling_rate), {**report, "without_events": without_events})


def count_overlapping_clips(clips: Sequence[Clip]) -> int:
    """Number of labeled clips that overlap in time with another clip of their class."""
    spans: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for number, clip in enumerate(clips):
        if clip.label >= 0:
            spans.setdefault((clip.video, clip.label), []).append((clip.frames[0], clip.frames[-1], number))
    found: set[int] = set()
    for class_spans in spans.values():
        class_spans.sort()
        for (_, end, number), (start, _, next_number) in itertools.pairwise(class_spans):
            if start <= end:
                found |= {number, next_number}
    return len(found)


def _check_choices(**choices: str) -> None:
    allowed = {"clips": ("events", "windows", "first"), "anchor": ("center", "start"), "label": ("event", "video")}
    for name, value in choices.items():
        if value not in allowed[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed[name])}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")


def _make_index(specs: Sequence[tuple[Rally, _ClipSpec]], offsets: range, report: dict[str, Any]) -> ClipIndex:
    """Number the classes and make the clips. `offsets` are a clip's frames relative to its first one."""
    classes = sorted({spec.label for _, spec in specs if spec.label is not None})
    class_numbers = {name: i for i, name in enumerate(classes)}
    clips = tuple(
        Clip(
            spec.id,
            rally.video,
            tuple(spec.start + offset for offset in offsets),
            -1 if spec.label is None else class_numbers[spec.label],
            rally.video,
        )
        for rally, spec in specs
    )
    if len({c.id for c in clips}) != len(clips):
        raise ValueError("two clips have the same id; list each video once in the annotations")
    return ClipIndex(clips, tuple(classes), {"clips": len(clips), "classes": len(classes), **report})


def _make_event_specs(rally: Rally, *, first_only: bool, before: int) -> list[_ClipSpec]:
    events = rally.events[:1] if first_only else rally.events
    return [_ClipSpec(f"{rally.video}#{n}@{e.frame}", e.frame - before, e.label) for n, e in enumerate(events)]
