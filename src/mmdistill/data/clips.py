"""Clips: the frames and the label of each sample, from rallies."""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mmdistill.data.annotations.base import Player, Rally
from mmdistill.data.annotations.f3set import check_label_fields, match_name, select_fields

if TYPE_CHECKING:
    from torch import Tensor

DISJOINT = ("video", "match", "player")  # values of ``data_module.disjoint``, from the weakest to the strictest
_CHOICES = {"clips": ("events", "windows", "first"), "anchor": ("center", "start"), "label": ("event", "video")}


@dataclass(frozen=True)
class Clip:
    """One sample."""

    id: str  # unique in its index. Everything random about the clip is seeded with it
    video: str  # name of the video in the files of every modality
    frames: tuple[int, ...]  # frame numbers, counted from 0
    label: int  # position in `ClipIndex.classes`; -1: no label
    group: str  # the recording. Few-shot episodes can keep support and query clips of one recording apart


@dataclass(frozen=True, eq=False)
class ClipTable(Sequence[Clip]):
    """Clips that are stored as 20 bytes each and created on access."""

    videos: tuple[str, ...]
    # int32 [clips, 5]: position of the video in `videos`, first frame, label, number and frame of the event (-1 and the
    # first frame: a window). A tensor is shared with loader workers, also with those that get a pickled copy
    rows: "np.ndarray | Tensor"
    num_frames: int  # frames per clip
    sampling_rate: int  # distance between frames of a clip

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Clip: ...

    @overload
    def __getitem__(self, i: slice) -> "ClipTable": ...

    def __getitem__(self, i: int | slice) -> "Clip | ClipTable":
        if isinstance(i, slice):
            return replace(self, rows=self.rows[i])
        position, start, label, number, frame = self.rows[i].tolist()
        video = self.videos[position]
        name = f"{video}:{frame:06d}" if number < 0 else f"{video}#{number}@{frame}"
        stop = start + self.num_frames * self.sampling_rate
        return Clip(name, video, tuple(range(start, stop, self.sampling_rate)), label, video)


@dataclass(frozen=True)
class ClipIndex:
    """Clips, their class names, and counts for the run's report (plain containers)."""

    clips: Sequence[Clip]
    classes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)

    def by_video(self) -> Iterator[tuple[str, list[Clip]]]:
        """The clips of each video. Clips of one video follow each other."""
        for video, clips in itertools.groupby(self.clips, attrgetter("video")):
            yield video, list(clips)


def select_clips(clips: Sequence[Clip], positions: Sequence[int]) -> Sequence[Clip]:
    """The clips at `positions`, stored as before."""
    if isinstance(clips, ClipTable):
        return replace(clips, rows=clips.rows[np.asarray(positions, dtype=np.int64)])
    return tuple(clips[i] for i in positions)


@dataclass(frozen=True)
class ClipSource:
    """What the annotations tell about a clip. A text is "" if it is unknown."""

    match: str  # name of the match; the name of the video if it contains no match
    label: str = ""  # the whole label of the event, also if `label_fields` selects a part of it as the class
    player: str = ""  # name of the player of the event: of near_name if the label begins with near
    hand: str = ""  # of this player


def clip_sources(clips: Iterable[Clip], rallies: Iterable[Rally]) -> tuple[ClipSource, ...]:
    """The source of each clip of an index that was built from these rallies. Windows have no event and no player."""
    by_video = {rally.video: rally for rally in rallies}
    found = []
    for clip in clips:
        rally, label = by_video[clip.video], ""
        if event := re.search(r"#(\d+)@\d+$", clip.id):  # the id of a clip with an event, see `ClipTable`
            label = rally.events[int(event[1])].label
        player = {"near": rally.near, "far": rally.far}.get(label.split("_")[0], Player())
        found.append(ClipSource(match_name(clip.video), label, player.name, player.hand))
    return tuple(found)


def required_frames(clips: Iterable[Clip]) -> list[int]:
    """The frames that clips of one video need: each once, sorted."""
    return sorted({frame for clip in clips for frame in clip.frames})


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
    videos: dict[str, int] = {}
    labels: dict[str, int] = {}  # by the order in which they occur
    blocks: list[np.ndarray] = []
    too_short, without_events, shifted = [], [], 0
    for rally in rallies:
        last_start = rally.num_frames - 1 - spec.span
        if last_start < 0:
            too_short.append(rally.video)
            continue
        rows = _rally_rows(rally, spec, last_start, labels)
        if not len(rows):
            without_events.append(rally.video)
        starts = rows[:, 1].clip(0, last_start)
        shifted += int((starts != rows[:, 1]).sum())
        rows[:, 0], rows[:, 1] = videos.setdefault(rally.video, len(videos)), starts
        blocks.append(rows)
    table = np.concatenate(blocks) if blocks else np.empty((0, 5), np.int32)
    classes = sorted(labels)
    numbers = np.array([*np.argsort([labels[name] for name in classes]), -1])  # by the order in which they occur
    table[:, 2] = numbers[table[:, 2]]  # -1 selects the last one
    clips = ClipTable(tuple(videos), table, spec.num_frames, spec.sampling_rate)
    if len(videos) < len(blocks) and len({clip.id for clip in clips}) < len(clips):
        raise ValueError("two clips have the same id; list each video once in the annotations")
    report = {
        "clips": len(clips), "classes": len(classes), "rallies": len(rallies), "shifted_into_video": shifted,
        "too_short": too_short, "without_events": without_events,
    }  # fmt: skip
    return ClipIndex(clips, tuple(classes), report)


def _rally_rows(rally: Rally, spec: ClipSpec, last_start: int, labels: dict[str, int]) -> np.ndarray:
    """The rows of `ClipTable.rows` of a rally, without its video. The first frame may lie outside the video.

    `labels` gets the new ones.
    """

    def number_of(label: str | None) -> int:
        return -1 if label is None else labels.setdefault(label, len(labels))

    own_label = rally.video if spec.label == "video" else None
    if spec.clips == "windows":
        starts = np.arange(0, last_start + 1, spec.stride or spec.span, dtype=np.int32)
        rows = np.full((len(starts), 5), -1, np.int32)
        rows[:, 1], rows[:, 2], rows[:, 4] = starts, number_of(own_label), starts
        return rows
    before = spec.num_frames // 2 * spec.sampling_rate if spec.anchor == "center" else 0
    found = []
    for number, event in enumerate(rally.events[:1] if spec.clips == "first" else rally.events):
        label = select_fields(event.label, spec.label_fields) if event.label else None
        found.append((-1, event.frame - before, number_of(own_label or label), number, event.frame))
    return np.array(found, np.int32).reshape(-1, 5)


def count_overlapping_clips(clips: Sequence[Clip]) -> int:
    """Number of labeled clips that overlap in time with another clip of their class."""
    ordered = sorted((c for c in clips if c.label >= 0), key=lambda c: (c.video, c.label, c.frames[0], c.frames[-1]))
    found: set[str] = set()
    for clip, following in itertools.pairwise(ordered):
        is_same_class = (clip.video, clip.label) == (following.video, following.label)
        if is_same_class and following.frames[0] <= clip.frames[-1]:
            found |= {clip.id, following.id}
    return len(found)
