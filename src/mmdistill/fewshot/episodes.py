"""Few-shot episodes: N classes, K support and Q query clips of each, drawn from labels alone.

An episode is a pure function of (labels, spec, seed, its number). 600 episodes are the first 600 of 10,000, and the
shards of all ranks together are exactly the episodes of one process.

Shapes: E episodes, N ways (classes of an episode), K shots, Q queries per class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmdistill.data.clips import DISJOINT, ClipSource
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
            query from the video of another class's support clip would be biased towards that class). "match" and
            "player": the same for the groups of `disjoint_groups`. None: any clips.
    """

    n_way: int = 5
    k_shot: int = 1
    q_sample: int = 15
    disjoint: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("n_way", 2), ("k_shot", 1), ("q_sample", 1)):
            if getattr(self, name) < least:
                raise EpisodeError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.disjoint not in (None, *DISJOINT):
            raise EpisodeError(f"disjoint={self.disjoint} is not one of none, {', '.join(DISJOINT)}")

    @property
    def where(self) -> str:
        """Where the clips of a class come from, for messages: ``in different videos``, ``from different players``."""
        if self.disjoint is None:
            return ""
        return f" {'from' if self.disjoint == 'player' else 'in'} different {format_count(2, self.disjoint)[2:]}"


def disjoint_groups(
    disjoint: str | None, videos: Sequence[str], sources: Sequence[ClipSource], labels: Sequence[int] | IntArray
) -> Sequence[object]:
    """The groups of the clips for `sample_episodes`: videos, matches, or pairs of match and player.

    The player is the one who plays the stroke. With "player", support and query clips of an episode have neither a
    player nor a match in common. `sources` is empty if nothing is known; `labels` are those of `eligible_classes`.

    Raises:
        EpisodeError: the match or the player of a labeled clip is unknown.
    """
    if disjoint in (None, "video"):
        return videos
    if not sources:
        plural = format_count(2, str(disjoint))[2:]
        raise EpisodeError(
            f"disjoint={disjoint}: the features have no {plural}; write them again with `mmdistill features`, or add "
            f"the array {plural} to the .npz file"
        )
    if disjoint == "match":
        return [source.match for source in sources]
    labeled = [source for source, label in zip(sources, labels, strict=True) if label >= 0]
    unknown = sum(not source.player for source in labeled)
    if unknown:
        raise EpisodeError(
            f"disjoint=player: the player is unknown in {unknown} of {format_count(len(labeled), 'clip')}; the "
            "annotation file needs near_name and far_name in each rally, and labels that begin with near or far; or "
            "use disjoint=match"
        )
    return [(source.match, source.player) for source in sources]


@dataclass(frozen=True)
class Eligibility:
    """Which classes can take part in an episode.

    Attributes:
        classes: label values with enough clips, ascending.
        excluded: label value -> number of clips, for all other classes.
        disjoint: see `EpisodeSpec`. With "video" a class can have enough clips, but too few in different videos.
        num_groups: label value -> number of videos, matches or players.
    """

    classes: tuple[int, ...]
    excluded: Mapping[int, int]
    disjoint: str | None = None
    num_groups: Mapping[int, int] = field(default_factory=dict)

    def describe(self, names: Sequence[str] | None = None, *, limit: int = 10) -> str:
        """Excluded classes and their numbers of clips, fewest first; at most `limit` names. "" if there is none."""
        if not self.excluded:
            return ""
        order = sorted(self.excluded.items(), key=lambda item: (item[1], item[0]))
        sizes = {label: str(count) for label, count in order}
        if self.disjoint in ("match", "player"):
            sizes = {n: _format_size(count, self.disjoint, self.num_groups[n]) for n, count in order}
        shown = format_first([f"{class_name(label, names)} ({size})" for label, size in sizes.items()], limit)
        return f"excluded classes, too few clips{EpisodeSpec(disjoint=self.disjoint).where}: {shown}"


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


def _format_size(num_clips: int, disjoint: str, num_groups: int) -> str:
    """``24 clips, 1 player``."""
    return f"{format_count(num_clips, 'clip')}, {format_count(num_groups, disjoint)}"


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

    `labels` are integers (clips,); clips with a negative value are never drawn. `groups` are the groups of the clips,
    which `spec.disjoint` needs: for each clip the name of a group, or a tuple of names; support and query clips have no
    name in common. `names` are those of the label values, for messages.

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
    eligible, excluded, num_groups = [], {}, {}
    for label, clips in by_class.items():
        num_clips = len(clips)
        for column in () if group_of is None else group_of[clips].T:
            sizes = np.unique(column, return_counts=True)[1]
            num_groups[label] = len(sizes)
            num_support = _smallest_sum(sizes.tolist(), spec.k_shot)
            available = 0 if num_support is None else spec.k_shot + len(clips) - num_support
            num_clips = min(num_clips, available)
        if num_clips >= needed:
            eligible.append(label)
        else:
            excluded[label] = len(clips)
    result = Eligibility(tuple(eligible), excluded, spec.disjoint, num_groups)
    if len(eligible) < spec.n_way:
        listed = f" ({result.describe(names)})" if excluded else ""
        raise EpisodeError(
            f"{spec.n_way}-way {spec.k_shot}-shot episodes with {format_count(spec.q_sample, 'query')} need "
            f"{spec.n_way} classes with at least {needed} clips{spec.where}; classes that have them: "
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
            sizes = [len(np.unique(group_of[c, -1])) for c in clips] if group_of is not None else []
            listed = ", ".join(
                f"{class_name(label, names)} ({_format_size(len(own), str(spec.disjoint), size)})"
                for label, own, size in zip(classes.tolist(), clips, sizes, strict=True)
            )
            raise EpisodeError(
                f"episode {e}: no draw of {spec.k_shot} support and {format_count(spec.q_sample, 'query clip')}"
                f"{spec.where.replace(' in ', ' from ')} was found for the classes {listed}; lower q_sample or k_shot, "
                "or unset disjoint"
            )
        drawn.append((*found, classes))
    support, query, all_classes = (np.stack(parts) for parts in zip(*drawn, strict=True))
    return Episodes(support, query, all_classes, np.arange(episodes, dtype=np.int64), eligibility, seed)


def _clips_by_class(
    labels: ArrayLike, groups: Sequence[object] | None, spec: EpisodeSpec
) -> tuple[dict[int, IntArray], IntArray | None]:
    """Clips of each label value, and the groups of every clip, int64 (clips, groups); None if groups do not matter."""
    values = np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise EpisodeError(f"labels must be a vector of integers, got {values.dtype} of shape {values.shape}")
    clips = {int(v): np.flatnonzero(values == v) for v in np.unique(values) if v >= 0}
    if spec.disjoint is None:
        return clips, None
    if groups is None or len(groups) != len(values):
        raise EpisodeError(f"disjoint={spec.disjoint} needs `groups`, the {spec.disjoint} of every clip")
    columns, first = [], 0
    for names in np.asarray(groups).reshape(len(values), -1).T:
        distinct, numbers = np.unique(names, return_inverse=True)
        columns.append(numbers.astype(np.int64) + first)
        first += len(distinct)
    return clips, np.stack(columns, axis=1)


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
                num_unused = (~used[group_of[order]]).sum(axis=1)
                order = order[np.lexsort((*keys.T, num_unused))]
            support[n] = order[: spec.k_shot]
            used[group_of[support[n]]] = True
        unused = [c[~used[group_of[c]].any(axis=1)] for c in clips]
        if min(len(c) for c in unused) >= spec.q_sample:
            return support, np.stack([rng.permutation(c)[: spec.q_sample] for c in unused])
    return None
