"""From rallies to clips: which frames make a clip, and which label it has."""

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
        id: unique in its index; seeds everything random about the clip.
        video: names the files of every modality.
        frames: frame numbers, counted from 0.
        label: position in `ClipIndex.classes`, -1 without a label.
        group: clips of one group come from one recording; few-shot episodes can keep them apart.
    """

    id: str
    video: str
    frames: tuple[int, ...]
    label: int
    group: str


@dataclass(frozen=True)
class ClipIndex:
    """Clips, their class names, and a report of how they came about (plain containers, for the run's report)."""

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _ClipSpec:
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

    A clip is `num_frames` frames, `sampling_rate` apart, and lies within frames 0 to ``rally.num_frames - 2``: flow
    pair k leads from k to k + 1, so the last frame has none. A window that would leave the video is shifted, never
    padded. A video shorter than a clip gives none and is listed in ``report["too_short"]``.

    Args:
        clips: ``events`` (a clip per event), ``first`` (only each rally's first event), ``windows`` (every `stride`
            frames, label -1 unless ``label="video"``).
        stride: frames between the starts of windows; None: the clip's span, so that windows do not overlap.
        anchor: the event lies in the middle of its clip (``center``: position ``num_frames // 2``) or at its ``start``.
        label_fields: F3Set fields that make the label; None: all.
        label: ``event``, or ``video``: the video's name is the class of each of its clips.

    Raises:
        ValueError: naming the argument.
    """
    _check(clips=clips, anchor=anchor, label=label)
    _check_counts(num_frames=num_frames, sampling_rate=sampling_rate, stride=1 if stride is None else stride)
    span = (num_frames - 1) * sampling_rate + 1
    before = num_frames // 2 * sampling_rate if anchor == "center" else 0
    drafts: list[tuple[Rally, _ClipSpec]] = []
    too_short, without_events, shifted = [], [], 0
    for rally in rallies:
        last_start = rally.num_frames - 1 - span
        if last_start < 0:
            too_short.append(rally.video)
            continue
        if clips == "windows":
            found = [_ClipSpec(f"{rally.video}:{s:06d}", s, None) for s in range(0, last_start + 1, stride or span)]
        else:
            found = _event_clips(rally, first_only=clips == "first", before=before)
            if not found:
                without_events.append(rally.video)
        for draft in found:
            start = min(max(draft.start, 0), last_start)
            shifted += start != draft.start
            own = select_fields(draft.label, label_fields) if draft.label else None
            drafts.append((rally, _ClipSpec(draft.id, start, rally.video if label == "video" else own)))
    report = {"rallies": len(rallies), "shifted_into_video": shifted, "too_short": too_short}
    return _finish(drafts, range(0, span, sampling_rate), {**report, "without_events": without_events})


def count_overlapping_clips(clips: Sequence[Clip]) -> int:
    """Labelled clips that overlap in time with another clip of their class."""
    spans: dict[tuple[str, int], list[tuple[int, int, int]]] = {}
    for number, clip in enumerate(clips):
        if clip.label >= 0:
            spans.setdefault((clip.video, clip.label), []).append((clip.frames[0], clip.frames[-1], number))
    found: set[int] = set()
    for own in spans.values():
        own.sort()
        for (_, end, number), (start, _, following) in itertools.pairwise(own):
            if start <= end:
                found |= {number, following}
    return len(found)


def _check(**choices: str) -> None:
    allowed = {"clips": ("events", "windows", "first"), "anchor": ("center", "start"), "label": ("event", "video")}
    for name, value in choices.items():
        if value not in allowed[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed[name])}")


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")


def _finish(drafts: Sequence[tuple[Rally, _ClipSpec]], offsets: range, report: dict[str, Any]) -> ClipIndex:
    """Number the classes and make the clips; `offsets` are a clip's frames counted from its start."""
    classes = sorted({d.label for _, d in drafts if d.label is not None})
    position = {name: i for i, name in enumerate(classes)}
    made = tuple(
        Clip(
            draft.id,
            rally.video,
            tuple(draft.start + offset for offset in offsets),
            -1 if draft.label is None else position[draft.label],
            rally.video,
        )
        for rally, draft in drafts
    )
    if len({c.id for c in made}) != len(made):
        raise ValueError("two clips have the same id; each video must occur once")
    return ClipIndex(made, tuple(classes), {"clips": len(made), "classes": len(classes), **report})


def _event_clips(rally: Rally, *, first_only: bool, before: int) -> list[_ClipSpec]:
    events = rally.events[:1] if first_only else rally.events
    return [_ClipSpec(f"{rally.video}#{n}@{e.frame}", e.frame - before, e.label) for n, e in enumerate(events)]
