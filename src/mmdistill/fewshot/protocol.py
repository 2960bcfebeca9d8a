"""The whole evaluation: networks x ways x shots x heads on the same episodes, and everything that is reported of it."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmdistill.console import progress
from mmdistill.distributed.collectives import all_gather_objects, get_rank, get_world_size
from mmdistill.fewshot.classifiers import Head, find_head
from mmdistill.fewshot.episodes import Episodes, eligible_classes, sample_episodes
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.logistic import default_workers
from mmdistill.fewshot.probe import FOLDS, probe_full_label_set, split_by_group
from mmdistill.fewshot.scores import EpisodeScores, evaluate, merge_scores, paired_difference, per_class, summarize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """What is asked.

    Attributes:
        n_way, k_shot: every combination is evaluated; the first of each is the headline.
        q_sample: queries per class.
        episodes: per combination.
        seed: of the episodes.
        heads: names of `heads.HEADS`; the first is the headline.
        disjoint: None, or "video": support and query from different recordings.
        support_views: see `evaluate.evaluate`.
        probe: also classify the full label set (linear probe, k-NN).
        workers: processes of the logistic head; None: all processors.
    """

    n_way: tuple[int, ...] = (5,)
    k_shot: tuple[int, ...] = (1,)
    q_sample: int = 15
    episodes: int = 600
    seed: int = 0
    heads: tuple[str, ...] = ("logistic",)
    disjoint: str | None = None
    support_views: str = "each"
    probe: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_way", "k_shot", "heads"):
            if not getattr(self, name):
                raise FewshotError(f"{name} is empty")
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.episodes < 2:
            raise FewshotError(f"episodes={self.episodes} must be at least 2: one episode has no standard error")
        for head in self.heads:
            find_head(head)

    def check(self, labels: Sequence[int], groups: Sequence[str], names: Sequence[str]) -> list[str]:
        """Whether these labels hold the episodes, before anything is encoded.

        Returns:
            one line per combination: classes drawn from, and those excluded.

        Raises:
            EpisodeError: fewer than N classes have enough clips, or no draw with separate videos is found.
            FewshotError: the probe cannot be split by video.
        """
        if self.probe:
            split_by_group(np.asarray(labels, dtype=np.int64), groups, folds=FOLDS, seed=self.seed)
        lines = []
        for n_way, k_shot in self.combinations():
            asked: dict[str, Any] = {"n_way": n_way, "k_shot": k_shot, "q_sample": self.q_sample, "names": names}
            found = eligible_classes(list(labels), groups=groups, disjoint=self.disjoint, **asked)
            if self.disjoint:  # a draw with separate videos can be impossible for some classes together
                sample_episodes(
                    list(labels), episodes=self.episodes, seed=self.seed, groups=groups, disjoint=self.disjoint, **asked
                )
            title = f"{n_way}-way {k_shot}-shot, {self.q_sample} queries"
            lines.append(f"{title}: {len(found.classes)} classes to draw from; {found.describe(names)}")
        return lines

    def combinations(self) -> list[tuple[int, int]]:
        """(n_way, k_shot) of every table."""
        return [(n, k) for n in self.n_way for k in self.k_shot]


@dataclass(frozen=True)
class Row:
    """One network, read out in one way, on one combination, with one head."""

    network: str
    input_mode: str
    scores: EpisodeScores
    summary: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Everything measured; `report` turns it into a table, JSON and a page.

    Attributes:
        protocol: what was asked.
        features: of each network and input_mode, the scored one first.
        rows: in the order combination, head, network.
        differences: paired differences between networks on the same episodes, first minus second.
        probes: full label set, one per network and input_mode.
    """

    protocol: Protocol
    features: tuple[Features, ...]
    rows: tuple[Row, ...]
    differences: tuple[dict[str, Any], ...]
    probes: tuple[dict[str, Any], ...] = field(default=())

    @property
    def headline(self) -> Row:
        """The scored network with the first combination and head."""
        return self.rows[0]


def run_protocol(features: Sequence[Features], protocol: Protocol, *, show_progress: bool = True) -> Results:
    """Evaluate features of several networks (and input_modes) on the same episodes.

    In a process group each rank takes its share of the episodes and all return the same results.

    Args:
        features: of the same clips in the same order; the first is the network that is scored, the others stand beside
            it.
        protocol: what to ask.

    Raises:
        FewshotError: the clips differ, two entries have the same name and input_mode, or the labels do not hold the
            episodes.
    """
    features = tuple(features)
    first = _check_features(features)
    rows: list[Row] = []
    differences: list[dict[str, Any]] = []
    total = len(protocol.combinations()) * len(protocol.heads) * len(features) * protocol.episodes
    world = get_world_size()
    with progress("episodes", total, enabled=show_progress and get_rank() == 0) as advance:
        for n_way, k_shot in protocol.combinations():
            episodes = _episodes(first, protocol, n_way, k_shot)
            for head in protocol.heads:
                block = []
                for f in features:
                    scores = _evaluate_over_ranks(f, episodes, head, protocol, lambda n: advance(n * world))
                    block.append(Row(f.network, f.input_mode, scores, {**_describe(f), **summarize(scores)}))
                rows += block
                differences += [_difference(a, b) for i, a in enumerate(block) for b in block[i + 1 :]]
    stopped = sum(row.scores.stopped for row in rows)
    if stopped:
        log.warning("%d logistic regressions stopped before they converged", stopped)
    probes = [_probe(f, protocol) for f in features] if protocol.probe else []
    return Results(protocol, features, tuple(rows), tuple(differences), tuple(probes))


def _check_features(features: tuple[Features, ...]) -> Features:
    if not features:
        raise FewshotError("no features to evaluate")
    names = [(f.network, f.input_mode) for f in features]
    for f in features[1:]:
        if not f.same_clips(features[0]):
            raise FewshotError(f"{f.network} and {features[0].network} have features of different clips")
    if len(set(names)) != len(names):
        raise FewshotError(f"two networks have the same name and input_mode: {', '.join(map(str, names))}")
    return features[0]


def _episodes(clips: Features, protocol: Protocol, n_way: int, k_shot: int) -> Episodes:
    return sample_episodes(
        clips.labels,
        n_way=n_way,
        k_shot=k_shot,
        q_sample=protocol.q_sample,
        episodes=protocol.episodes,
        seed=protocol.seed,
        groups=clips.groups,
        disjoint=protocol.disjoint,
        names=clips.classes,
    )


def _evaluate_over_ranks(
    f: Features, episodes: Episodes, head: str | Head, protocol: Protocol, advance: Any
) -> EpisodeScores:
    workers = protocol.workers
    if workers is None and get_world_size() > 1:  # the ranks of one machine share its processors
        here = int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))
        workers = max(1, default_workers() // here)
    options = {"workers": workers, "support_views": protocol.support_views, "advance": advance}
    if get_world_size() == 1:
        return evaluate(f.features, episodes, head, **options)
    share = episodes.shard(get_rank(), get_world_size())
    parts = all_gather_objects(evaluate(f.features, share, head, **options) if len(share) else None)
    return merge_scores([part for part in parts if part is not None], episodes)


def _describe(f: Features) -> dict[str, Any]:
    keep = ("checkpoint", "modality", "views", "n_masks", "mask_ratio", "seconds", "cached")
    return {"network": f.network, "input_mode": f.input_mode, **{k: f.info[k] for k in keep if k in f.info}}


def _difference(a: Row, b: Row) -> dict[str, Any]:
    names = {
        "first": a.network,
        "first_input_mode": a.input_mode,
        "second": b.network,
        "second_input_mode": b.input_mode,
    }
    setting = {key: a.summary[key] for key in ("n_way", "k_shot", "classifier")}
    return {**names, **setting, **paired_difference(a.scores, b.scores)}


def _probe(f: Features, protocol: Protocol) -> dict[str, Any]:
    found = probe_full_label_set(f.features, f.labels, groups=f.groups, seed=protocol.seed)
    return {"network": f.network, "input_mode": f.input_mode, **found}


def class_table(row: Row, classes: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Accuracy of each class, by name, for one row."""
    return per_class(row.scores, classes)
