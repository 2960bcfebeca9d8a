"""Few-shot episodes: N classes, K support and Q query clips of each, drawn from labels alone.

An episode is a pure function of (labels, protocol, seed, its number). 600 episodes are the first 600 of 10,000, and
the shards of all ranks together are exactly the episodes of one process.

Shapes: E episodes, N ways (classes of an episode), K shots, Q queries per class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmdistill.errors import format_count, format_first
from mmdistill.fewshot.errors import EpisodeError
from mmdistill.randomness import integer_rng

IntArray = NDArray[np.int64]

_UNIFORM_TRIES = 50
_COMPACT_TRIES = 200


@dataclass(frozen=True)
class Eligibility:
    """Which classes can take part in an episode.

    Attributes:
        classes: label values with enough clips, ascending.
        excluded: label value -> number of clips, for all other classes.
        disjoint: None, or "video". With "video" a class can have enough clips, but too few in different videos.
    """

    classes: tuple[int, ...]
    excluded: Mapping[int, int]
    disjoint: str | None = None

    def describe(self, names: Sequence[str] | None = None, *, limit: int = 10) -> str:
        """Excluded classes and their numbers of clips, fewest first; at most `limit` names. "" if there is none."""
        if not self.excluded:
            return ""
        order = sorted(self.excluded.items(), key=lambda item: (item[1], item[0]))
        shown = format_first([f"{class_name(label, names)} ({count})" for label, count in order], limit)
        where = " in different videos" if self.disjoint else ""
        return f"excluded classes, too few clips{where}: {shown}"


@dataclass(frozen=True)
class Episodes:
    """Episodes as indices into the clips.

    Attributes:
        support: int64 (E, N, K) clip indices.
        query: int64 (E, N, Q) clip indices; within a class all K + Q are distinct.
        classes: int64 (E, N) label values, distinct within an episode.
        numbers: int64 (E,) position of each episode in the series; `shard` keeps them.
        eligibility: the eligible and the excluded classes.
        seed: of the series.
        disjoint: "video" if no group contains support and query clips of the same episode.
    """

    support: IntArray
    query: IntArray
    classes: IntArray
    numbers: IntArray
    eligibility: Eligibility = field(default_factory=lambda: Eligibility((), {}))
    seed: int = 0
    disjoint: str | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def n_way(self) -> int:
        """N, classes per episode."""
        return int(self.support.shape[1])

    @property
    def k_shot(self) -> int:
        """K, support clips per class."""
        return int(self.support.shape[2])

    @property
    def q_sample(self) -> int:
        """Q, query clips per class."""
        return int(self.query.shape[2])

    @property
    def targets(self) -> IntArray:
        """True classes of the queries, positions 0..N-1 in `classes`, the same in every episode. int64 (N * Q,)."""
        return np.repeat(np.arange(self.n_way, dtype=np.int64), self.q_sample)

    def take(self, rows: ArrayLike) -> "Episodes":
        """The episodes at these positions."""
        index = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            support=self.support[index],
            query=self.query[index],
            classes=self.classes[index],
            numbers=self.numbers[index],
        )

    def shard(self, rank: int, world_size: int) -> "Episodes":
        """Every `world_size`-th episode, starting at `rank`. Over all ranks each episode occurs exactly once."""
        if not 0 <= rank < world_size:
            raise EpisodeError(f"rank {rank} is not in [0, {world_size})")
        return self.take(np.arange(rank, len(self), world_size))

    def has_same_clips(self, other: "Episodes") -> bool:
        """Whether both contain the same clips in the same order, so that a paired comparison is valid."""
        return (
            np.array_equal(self.support, other.support)
            and np.array_equal(self.query, other.query)
            and np.array_equal(self.classes, other.classes)
        )


def class_name(label: int, names: Sequence[str] | None) -> str:
    """The name of a label value, or the number itself."""
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def eligible_classes(
    labels: ArrayLike,
    *,
    n_way: int,
    k_shot: int,
    q_sample: int,
    groups: Sequence[object] | None = None,
    disjoint: str | None = None,
    names: Sequence[str] | None = None,
) -> Eligibility:
    """Classes that can supply K support and Q query clips. It needs labels only, so call it before encoding.

    Args:
        labels: (clips,) integers; clips with a negative value have no label and are never drawn.
        n_way: N, at least 2.
        k_shot: K, at least 1.
        q_sample: Q, at least 1.
        groups: (clips,) video of each clip; needed for `disjoint`.
        disjoint: None, or "video": support and query clips of an episode come from different groups.
        names: names of the label values, for messages.

    Raises:
        EpisodeError: fewer than N classes remain; the message lists the counts.
    """
    table = _Table.build(labels, groups, disjoint)
    _validate_protocol(n_way, k_shot, q_sample)
    if not table.clips:
        raise EpisodeError(
            "no clip has a label: the annotations have none, or the clips are windows, which have none "
            "(set data_module.eval_clips=events or data_module.label=video)"
        )
    eligible, excluded = [], {}
    for label, clips in table.clips.items():
        if table.groups is None:
            num_clips = len(clips)
        else:
            _, sizes = np.unique(table.groups[clips], return_counts=True)
            num_support = _smallest_sum(sizes.tolist(), k_shot)
            num_clips = 0 if num_support is None else k_shot + len(clips) - num_support
        if num_clips >= k_shot + q_sample:
            eligible.append(label)
        else:
            excluded[label] = len(clips)
    result = Eligibility(tuple(eligible), excluded, disjoint)
    if len(eligible) < n_way:
        where = " in different videos" if disjoint else ""
        listed = f" ({result.describe(names)})" if excluded else ""
        raise EpisodeError(
            f"{n_way}-way {k_shot}-shot episodes with {format_count(q_sample, 'query')} need {n_way} classes with at "
            f"least {k_shot + q_sample} clips{where}; classes that have them: {len(eligible)} of {len(table.clips)}"
            f"{listed}; lower n_way, k_shot or q_sample, or merge labels (label_fields)"
        )
    return result


def sample_episodes(
    labels: ArrayLike,
    *,
    n_way: int,
    k_shot: int,
    q_sample: int,
    episodes: int,
    seed: int,
    groups: Sequence[object] | None = None,
    disjoint: str | None = None,
    names: Sequence[str] | None = None,
) -> Episodes:
    """Draw episodes: N distinct eligible classes, then K + Q distinct clips of each, all uniformly.

    With ``disjoint="video"`` no group supplies both support and query clips of an episode, over all of its classes (a
    query from the video of another class's support clip would be biased towards that class). The support clips are then
    drawn first, and the queries from the remaining groups. A draw that leaves too few queries is repeated.

    Args:
        labels: (clips,) integers; negative: no label.
        n_way: N, at least 2.
        k_shot: K, at least 1.
        q_sample: Q, at least 1.
        episodes: E, at least 1.
        seed: non-negative.
        groups: (clips,) video of each clip; needed for `disjoint`.
        disjoint: None, or "video", see above.
        names: names of the label values, for messages.

    Raises:
        EpisodeError: fewer than N classes have K + Q clips, or no draw with disjoint groups was found.
    """
    if episodes < 1:
        raise EpisodeError(f"episodes={episodes} must be at least 1")
    if seed < 0:
        raise EpisodeError(f"seed={seed} must not be negative")
    eligibility = eligible_classes(
        labels, n_way=n_way, k_shot=k_shot, q_sample=q_sample, groups=groups, disjoint=disjoint, names=names
    )
    table = _Table.build(labels, groups, disjoint)
    support = np.empty((episodes, n_way, k_shot), dtype=np.int64)
    query = np.empty((episodes, n_way, q_sample), dtype=np.int64)
    classes = np.empty((episodes, n_way), dtype=np.int64)
    pool = np.array(eligibility.classes, dtype=np.int64)
    for e in range(episodes):
        rng = integer_rng(seed, e)
        classes[e] = rng.choice(pool, size=n_way, replace=False)
        clips = [table.clips[int(label)] for label in classes[e]]
        if table.groups is None:
            for n, candidates in enumerate(clips):
                drawn = rng.permutation(candidates)[: k_shot + q_sample]
                query[e, n], support[e, n] = drawn[:q_sample], drawn[q_sample:]
        else:
            found = _draw_disjoint(clips, table.groups, k_shot, q_sample, rng)
            if found is None:
                listed = ", ".join(class_name(int(label), names) for label in classes[e])
                raise EpisodeError(
                    f"episode {e}: no draw of {k_shot} support and {format_count(q_sample, 'query clip')} from "
                    f"different videos was found for the classes {listed}; lower q_sample or k_shot, or unset disjoint"
                )
            support[e], query[e] = found
    return Episodes(support, query, classes, np.arange(episodes, dtype=np.int64), eligibility, seed, disjoint)


@dataclass(frozen=True)
class _Table:
    """Clips by class, and the group of every clip if `disjoint` is set."""

    clips: dict[int, IntArray]
    groups: IntArray | None

    @staticmethod
    def build(labels: ArrayLike, groups: Sequence[object] | None, disjoint: str | None) -> "_Table":
        values = np.asarray(labels)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise EpisodeError(f"labels must be a vector of integers, got {values.dtype} of shape {values.shape}")
        if disjoint not in (None, "video"):
            raise EpisodeError(f"disjoint={disjoint} is not one of none, video")
        clips = {int(v): np.flatnonzero(values == v) for v in np.unique(values) if v >= 0}
        if disjoint is None:
            return _Table(clips, None)
        if groups is None or len(groups) != len(values):
            raise EpisodeError("disjoint=video needs `groups`, the video of every clip")
        _, codes = np.unique(np.asarray(groups), return_inverse=True)
        return _Table(clips, codes.astype(np.int64))


def _validate_protocol(n_way: int, k_shot: int, q_sample: int) -> None:
    for name, value, least in (("n_way", n_way, 2), ("k_shot", k_shot, 1), ("q_sample", q_sample, 1)):
        if value < least:
            raise EpisodeError(f"{name}={value} must be at least {least}")


def _smallest_sum(sizes: Sequence[int], least: int) -> int | None:
    """The smallest sum >= `least` of a subset of `sizes`, or None. It is the fewest clips that the support occupies."""
    reachable = 1  # bit s is set when some subset sums to s
    for size in sizes:
        reachable |= reachable << size
    above = reachable >> least
    return None if above == 0 else least + (above & -above).bit_length() - 1


def _draw_disjoint(
    clips: Sequence[IntArray], groups: IntArray, k_shot: int, q_sample: int, rng: np.random.Generator
) -> tuple[IntArray, IntArray] | None:
    """Support (N, K) and query (N, Q) without a common group, or None.

    The first tries draw support clips uniformly. If there are few, large groups, such draws occupy all groups, so later
    tries draw the support from as few groups as possible.
    """
    for attempt in range(_UNIFORM_TRIES + _COMPACT_TRIES):
        compact = attempt >= _UNIFORM_TRIES
        used = np.zeros(int(groups.max()) + 1, dtype=bool)
        support = np.empty((len(clips), k_shot), dtype=np.int64)
        for n in rng.permutation(len(clips)):
            order = rng.permutation(clips[n])
            if compact:
                keys = rng.permutation(len(used))[groups[order]]  # keeps the clips of a group together
                order = order[np.lexsort((keys, ~used[groups[order]]))]
            support[n] = order[:k_shot]
            used[groups[support[n]]] = True
        unused = [c[~used[groups[c]]] for c in clips]
        if min(len(c) for c in unused) >= q_sample:
            return support, np.stack([rng.permutation(c)[:q_sample] for c in unused])
    return None
