"""Few-shot episodes: N classes, K support and Q query clips of each, drawn from labels alone.

An episode is a pure function of (labels, spec, seed, its number). 600 episodes are the first 600 of 10,000, and the
shards of all ranks together are exactly the episodes of one process.

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
FloatArray = NDArray[np.float32]

_UNIFORM_TRIES = 50
_COMPACT_TRIES = 200


@dataclass(frozen=True)
class EpisodeSpec:
    """The composition of an episode.

    Attributes:
        n_way: N, at least 2.
        k_shot: K, at least 1.
        q_sample: Q, at least 1.
        disjoint: "video": no group supplies both support and query clips of an episode, over all of its classes (a
            query from the video of another class's support clip would be biased towards that class). None: any clips.
    """

    n_way: int = 5
    k_shot: int = 1
    q_sample: int = 15
    disjoint: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("n_way", 2), ("k_shot", 1), ("q_sample", 1)):
            if getattr(self, name) < least:
                raise EpisodeError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.disjoint not in (None, "video"):
            raise EpisodeError(f"disjoint={self.disjoint} is not one of none, video")


@dataclass(frozen=True)
class Eligibility:
    """Which classes can take part in an episode.

    Attributes:
        classes: label values with enough clips, ascending.
        excluded: label value -> number of clips, for all other classes.
        disjoint: see `EpisodeSpec`. With "video" a class can have enough clips, but too few in different videos.
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
    """

    support: IntArray
    query: IntArray
    classes: IntArray
    numbers: IntArray
    eligibility: Eligibility = field(default_factory=lambda: Eligibility((), {}))
    seed: int = 0

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def n_way(self) -> int:
        """N."""
        return int(self.support.shape[1])

    @property
    def k_shot(self) -> int:
        """K."""
        return int(self.support.shape[2])

    @property
    def q_sample(self) -> int:
        """Q."""
        return int(self.query.shape[2])

    @property
    def targets(self) -> IntArray:
        """True classes of the queries, positions 0..N-1 in `classes`, the same in every episode. int64 (N * Q,)."""
        return np.repeat(np.arange(self.n_way, dtype=np.int64), self.q_sample)

    def take(self, rows: ArrayLike) -> "Episodes":
        """The episodes at these positions."""
        index = np.asarray(rows, dtype=np.int64)
        arrays = {name: getattr(self, name)[index] for name in ("support", "query", "classes", "numbers")}
        return replace(self, **arrays)

    def shard(self, rank: int, world_size: int) -> "Episodes":
        """Every `world_size`-th episode, starting at `rank`. Over all ranks each episode occurs exactly once."""
        if not 0 <= rank < world_size:
            raise EpisodeError(f"rank {rank} is not in [0, {world_size})")
        return self.take(np.arange(rank, len(self), world_size))

    def has_same_clips(self, other: "Episodes") -> bool:
        """Whether both contain the same clips in the same order, so that a paired comparison is valid."""
        return all(np.array_equal(getattr(self, n), getattr(other, n)) for n in ("support", "query", "classes"))


def class_name(label: int, names: Sequence[str] | None) -> str:
    """The name of a label value, or the number itself."""
    return names[label] if names is not None and 0 <= label < len(names) else str(label)


def eligible_classes(
    labels: ArrayLike,
    spec: EpisodeSpec,
    *,
    groups: Sequence[object] | None = None,
    names: Sequence[str] | None = None,
) -> Eligibility:
    """Classes that can supply K support and Q query clips.

    `labels` are integers (clips,); clips with a negative value are never drawn. `groups` are the videos of the clips,
    needed for ``disjoint="video"``. `names` are those of the label values, for messages.

    Raises:
        EpisodeError: fewer than N classes remain; the message lists the counts.
    """
    by_class, group_of = _clips_by_class(labels, groups, spec)
    if not by_class:
        raise EpisodeError(
            "no clip has a label: the annotations have none, or the clips are windows, which have none "
            "(set data_module.eval_clips=events or data_module.label=video)"
        )
    needed = spec.k_shot + spec.q_sample
    eligible, excluded = [], {}
    for label, clips in by_class.items():
        num_clips = len(clips)
        if group_of is not None:
            _, sizes = np.unique(group_of[clips], return_counts=True)
            num_support = _smallest_sum(sizes.tolist(), spec.k_shot)
            num_clips = 0 if num_support is None else spec.k_shot + num_clips - num_support
        if num_clips >= needed:
            eligible.append(label)
        else:
            excluded[label] = len(clips)
    result = Eligibility(tuple(eligible), excluded, spec.disjoint)
    if len(eligible) < spec.n_way:
        where = " in different videos" if spec.disjoint else ""
        listed = f" ({result.describe(names)})" if excluded else ""
        raise EpisodeError(
            f"{spec.n_way}-way {spec.k_shot}-shot episodes with {format_count(spec.q_sample, 'query')} need "
            f"{spec.n_way} classes with at least {needed} clips{where}; classes that have them: "
            f"{len(eligible)} of {len(by_class)}{listed}; {_fix(spec, len(eligible), len(by_class))}"
        )
    return result


def _fix(spec: EpisodeSpec, num_eligible: int, num_classes: int) -> str:
    """How to get episodes from `num_eligible` classes, fewer than N."""
    smaller = f"use data_module.n_way={num_eligible}" if num_eligible > 1 else ""
    if num_eligible > 1 and spec.n_way > num_classes:
        return smaller
    return " or ".join(filter(None, (smaller, "lower k_shot or q_sample, or merge labels (label_fields)")))


def sample_episodes(
    labels: ArrayLike,
    spec: EpisodeSpec,
    *,
    episodes: int,
    seed: int,
    groups: Sequence[object] | None = None,
    names: Sequence[str] | None = None,
) -> Episodes:
    """Draw episodes: N distinct eligible classes, then K + Q distinct clips of each, all uniformly.

    With ``disjoint="video"`` the support clips are drawn first, and the queries from the remaining groups. A draw that
    leaves too few queries is repeated. `labels`, `groups` and `names` are those of `eligible_classes`.

    Raises:
        EpisodeError: fewer than N classes have K + Q clips, or no draw with disjoint groups was found.
    """
    if episodes < 1:
        raise EpisodeError(f"episodes={episodes} must be at least 1")
    if seed < 0:
        raise EpisodeError(f"seed={seed} must not be negative")
    eligibility = eligible_classes(labels, spec, groups=groups, names=names)
    by_class, group_of = _clips_by_class(labels, groups, spec)
    pool = np.array(eligibility.classes, dtype=np.int64)
    drawn = []
    for e in range(episodes):
        rng = integer_rng(seed, e)
        classes = rng.choice(pool, size=spec.n_way, replace=False)
        clips = [by_class[label] for label in classes.tolist()]
        found = _draw(clips, spec, rng) if group_of is None else _draw_disjoint(clips, group_of, spec, rng)
        if found is None:
            listed = ", ".join(class_name(label, names) for label in classes.tolist())
            raise EpisodeError(
                f"episode {e}: no draw of {spec.k_shot} support and {format_count(spec.q_sample, 'query clip')} from "
                f"different videos was found for the classes {listed}; lower q_sample or k_shot, or unset disjoint"
            )
        drawn.append((*found, classes))
    support, query, all_classes = (np.stack(parts) for parts in zip(*drawn, strict=True))
    return Episodes(support, query, all_classes, np.arange(episodes, dtype=np.int64), eligibility, seed)


def _clips_by_class(
    labels: ArrayLike, groups: Sequence[object] | None, spec: EpisodeSpec
) -> tuple[dict[int, IntArray], IntArray | None]:
    """Clips of each label value, and the group of every clip as an integer; None if groups do not matter."""
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise EpisodeError(f"labels must be a vector of integers, got {values.dtype} of shape {values.shape}")
    clips = {int(v): np.flatnonzero(values == v) for v in np.unique(values) if v >= 0}
    if spec.disjoint is None:
        return clips, None
    if groups is None or len(groups) != len(values):
        raise EpisodeError("disjoint=video needs `groups`, the video of every clip")
    return clips, np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def _smallest_sum(sizes: Sequence[int], least: int) -> int | None:
    """The smallest sum >= `least` of a subset of `sizes`, or None. It is the fewest clips that the support occupies."""
    reachable = 1  # bit s is set when some subset sums to s
    for size in sizes:
        reachable |= reachable << size
    above = reachable >> least
    return None if above == 0 else least + (above & -above).bit_length() - 1


def _draw(clips: Sequence[IntArray], spec: EpisodeSpec, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Support (N, K) and query (N, Q) of these clips of each class."""
    drawn = np.stack([rng.permutation(c)[: spec.k_shot + spec.q_sample] for c in clips])
    return drawn[:, spec.q_sample :], drawn[:, : spec.q_sample]


def _draw_disjoint(
    clips: Sequence[IntArray], group_of: IntArray, spec: EpisodeSpec, rng: np.random.Generator
) -> tuple[IntArray, IntArray] | None:
    """Support (N, K) and query (N, Q) without a common group, or None.

    The first tries draw support clips uniformly. If there are few, large groups, such draws occupy all groups, so later
    tries draw the support from as few groups as possible.
    """
    for attempt in range(_UNIFORM_TRIES + _COMPACT_TRIES):
        used = np.zeros(int(group_of.max()) + 1, dtype=bool)
        support = np.empty((len(clips), spec.k_shot), dtype=np.int64)
        for n in rng.permutation(len(clips)):
            order = rng.permutation(clips[n])
            if attempt >= _UNIFORM_TRIES:
                keys = rng.permutation(len(used))[group_of[order]]  # keeps the clips of a group together
                order = order[np.lexsort((keys, ~used[group_of[order]]))]
            support[n] = order[: spec.k_shot]
            used[group_of[support[n]]] = True
        unused = [c[~used[group_of[c]]] for c in clips]
        if min(len(c) for c in unused) >= spec.q_sample:
            return support, np.stack([rng.permutation(c)[: spec.q_sample] for c in unused])
    return None
