"""Clips: the frames and the label of each sample, from rallies."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import check_label_fields, select_fields

_CHOICES = {"clips": ("events", "windows", "first"), "anchor": ("center", "start"), "label": ("event", "video")}


@dataclass(frozen=True)
class Clip:
    """One sample."""

    id: str  # unique in its index. Everything random about the clip is seeded with it
    video: str  # name of the video in the files of every modality
    frames: tuple[int, ...]  # frame numbers, counted from 0
    label: int  # position in `ClipIndex.classes`; -1: no label
    group: str  # the recording. Few-shot episodes can keep support and query clips of one recording apart


@dataclass(frozen=True)
class ClipIndex:
    """Clips, their class names, and counts for the run's report (plain containers)."""

    clips: tuple[Clip, ...]
    classes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)

    def frames_by_video(self) -> dict[str, list[int]]:
        """The frames that the clips need: each once per video, sorted."""
        frames: dict[str, set[int]] = {}
        for clip in self.clips:
            frames.setdefault(clip.video, set()).update(clip.frames)
        return {video: sorted(numbers) for video, numbers in frames.items()}


@dataclass(frozen=True)
class ClipSpec:
    """Which parts of a video become clips.

    Raises:
        ValueError: a value is invalid; names it.
    """

    # ``events`` (one clip per event), ``first`` (one clip per rally, for its first event), ``windows`` (one
    # clip every `stride` frames, label -1 unless ``label="video"``)
    clips: str
    num_frames: int  # frames per clip
    sampling_rate: int = 1  # distance between frames of a clip
    # frames between the starts of windows; None: the clip's span, so that windows do not overlap
    stride: int | None = None
    # position of the event in its clip: ``center`` (frame ``num_frames // 2`` of the clip) or ``start``
    anchor: str = "center"
    label_fields: Sequence[str] | None = None  # fields that define the class, see `select_fields`; None: all
    label: str = "event"  # ``event``: the event's label is the class. ``video``: the video's name is the class

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        for name in ("num_frames", "sampling_rate", "stride"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ValueError(f"{name}={count} must be at least 1")
        if self.label_fields is not None:
            check_label_fields(self.label_fields)

    @property
    def span(self) -> int:
        """Frames from the first to the last frame of a clip."""
        return (self.num_frames - 1) * self.sampling_rate + 1


def build_index(rallies: Sequence[Rally], spec: ClipSpec) -> ClipIndex:
    """All clips of `rallies`.

    A clip lies within frames 0 to ``rally.num_frames - 2``. The last frame is excluded because flow k is the
    displacement from frame k to k + 1. A clip that would start before or end after the video is moved inside it, never
    padded. A video shorter than a clip has none and is listed in ``report["too_short"]``.

    Raises:
        ValueError: two clips have the same id, because a video occurs twice.
    """
    found: list[tuple[str, Rally, int, str | None]] = []  # id, rally, first frame, label
    too_short, without_events, shifted = [], [], 0
    for rally in rallies:
        last_start = rally.num_frames - 1 - spec.span
        if last_start < 0:
            too_short.append(rally.video)
            continue
        starts = list(_clip_starts(rally, spec, last_start))
        if not starts:
            without_events.append(rally.video)
        for clip_id, wanted, label in starts:
            start = min(max(wanted, 0), last_start)
            shifted += start != wanted
            found.append((clip_id, rally, start, label))
    if len({clip_id for clip_id, *_ in found}) != len(found):
        raise ValueError("two clips have the same id; list each video once in the annotations")
    classes = sorted({label for *_, label in found if label is not None})
    numbers: dict[str | None, int] = {None: -1, **{name: i for i, name in enumerate(classes)}}
    clips = tuple(
        Clip(clip_id, r.video, tuple(range(start, start + spec.span, spec.sampling_rate)), numbers[label], r.video)
        for clip_id, r, start, label in found
    )
    report = {
        "clips": len(clips), "classes": len(classes), "rallies": len(rallies), "shifted_into_video": shifted,
        "too_short": too_short, "without_events": without_events,
    }  # fmt: skip
    return ClipIndex(clips, tuple(classes), report)


def _clip_starts(rally: Rally, spec: ClipSpec, last_start: int) -> Iterator[tuple[str, int, str | None]]:
    """(id, first frame, label) of the clips of a rally. The first frame may lie outside the video."""
    own_label = rally.video if spec.label == "video" else None
    if spec.clips == "windows":
        for start in range(0, last_start + 1, spec.stride or spec.span):
            yield f"{rally.video}:{start:06d}", start, own_label
        return
    before = spec.num_frames // 2 * spec.sampling_rate if spec.anchor == "center" else 0
    for number, event in enumerate(rally.events[:1] if spec.clips == "first" else rally.events):
        label = select_fields(event.label, spec.label_fields) if event.label else None
        yield f"{rally.video}#{number}@{event.frame}", event.frame - before, own_label or label


def count_overlapping_clips(clips: Sequence[Clip]) -> int:
    """Number of labeled clips that overlap in time with another clip of their class."""
    ordered = sorted((c for c in clips if c.label >= 0), key=lambda c: (c.video, c.label, c.frames[0], c.frames[-1]))
    found: set[str] = set()
    for clip, following in itertools.pairwise(ordered):
        is_same_class = (clip.video, clip.label) == (following.video, following.label)
        if is_same_class and following.frames[0] <= clip.frames[-1]:
            found |= {clip.id, following.id}
    return len(found)
