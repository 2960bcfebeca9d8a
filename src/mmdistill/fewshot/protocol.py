"""The complete evaluation: every network, N-way, K-shot and classifier on the same episodes, and the results."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmdistill.console import progress
from mmdistill.distributed.collectives import all_gather_objects, get_rank, get_world_size
from mmdistill.errors import format_count
from mmdistill.fewshot.classifiers import get_classifier
from mmdistill.fewshot.episodes import Episodes, eligible_classes, sample_episodes
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.logistic import default_num_workers
from mmdistill.fewshot.probe import FOLDS, probe_full_label_set, split_by_group
from mmdistill.fewshot.scores import EpisodeScores, evaluate_episodes, merge_scores, paired_difference, summarize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """Settings of an evaluation.

    Attributes:
        n_way, k_shot: every combination is evaluated; the first of each is the headline.
        q_sample: queries per class.
        episodes: number of episodes per combination.
        seed: seed of the episodes.
        classifiers: names in `CLASSIFIERS`; the first is the headline.
        disjoint: None, or "video": support and query clips come from different videos.
        support_views: see `evaluate_episodes`.
        probe: also classify the full label set (linear probe, k-NN).
        workers: number of processes of the logistic regression; None: all processors.
    """

    n_way: tuple[int, ...] = (5,)
    k_shot: tuple[int, ...] = (1,)
    q_sample: int = 15
    episodes: int = 600
    seed: int = 0
    classifiers: tuple[str, ...] = ("logistic",)
    disjoint: str | None = None
    support_views: str = "each"
    probe: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_way", "k_shot", "classifiers"):
            if not getattr(self, name):
                raise FewshotError(f"{name} is empty")
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.episodes < 2:
            raise FewshotError(f"episodes={self.episodes} must be at least 2: one episode has no standard error")
        for classifier in self.classifiers:
            get_classifier(classifier)

    def check(self, labels: Sequence[int], groups: Sequence[str], names: Sequence[str]) -> list[str]:
        """Check before encoding that these labels supply the episodes.

        Returns:
            One log line per combination: the number of eligible classes, and the excluded ones.

        Raises:
            EpisodeError: fewer than N classes have enough clips, or no draw with disjoint videos is found.
            FewshotError: the probe cannot be split by video.
        """
        if self.probe:
            split_by_group(np.asarray(labels, dtype=np.int64), groups, folds=FOLDS, seed=self.seed)
        lines = []
        for n_way, k_shot in self.combinations():
            sizes: dict[str, Any] = {"n_way": n_way, "k_shot": k_shot, "q_sample": self.q_sample, "names": names}
            found = eligible_classes(list(labels), groups=groups, disjoint=self.disjoint, **sizes)
            if self.disjoint:  # a draw can be impossible for several classes together
                sample_episodes(
                    list(labels), episodes=self.episodes, seed=self.seed, groups=groups, disjoint=self.disjoint, **sizes
                )
            excluded = found.describe(names)
            lines.append(
                f"{n_way}-way {k_shot}-shot, {format_count(self.q_sample, 'query')} per class: "
                f"{format_count(len(found.classes), 'eligible class')}" + (f"; {excluded}" if excluded else "")
            )
        return lines

    def combinations(self) -> list[tuple[int, int]]:
        """(n_way, k_shot) of every table."""
        return [(n, k) for n in self.n_way for k in self.k_shot]


@dataclass(frozen=True)
class Row:
    """One network in one input mode, with one combination of N-way and K-shot and one classifier."""

    network: str
    input_mode: str
    scores: EpisodeScores
    summary: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """All results; `evaluation.report` writes them as tables, JSON and a page.

    Attributes:
        protocol: the settings.
        features: of each network and input mode, the scored network first.
        rows: in the order combination, classifier, network.
        differences: paired differences between networks on the same episodes, first minus second.
        probes: full label set, one per network and input mode.
    """

    protocol: Protocol
    features: tuple[Features, ...]
    rows: tuple[Row, ...]
    differences: tuple[dict[str, Any], ...]
    probes: tuple[dict[str, Any], ...] = field(default=())

    @property
    def headline(self) -> Row:
        """The scored network with the first combination and classifier."""
        return self.rows[0]


def run_protocol(features: Sequence[Features], protocol: Protocol, *, show_progress: bool = True) -> Results:
    """Evaluate features of several networks and input modes on the same episodes.

    In a process group each rank evaluates its share of the episodes, and all ranks return the same results.

    Args:
        features: of the same clips in the same order. The first is the scored network, the others are baselines.
        protocol: the settings.
        show_progress: show a progress bar.

    Raises:
        FewshotError: the clips differ, two entries have the same name and input mode, or the labels do not supply the
            episodes.
    """
    features = tuple(features)
    first = _check_features(features)
    rows: list[Row] = []
    differences: list[dict[str, Any]] = []
    total = len(protocol.combinations()) * len(protocol.classifiers) * len(features) * protocol.episodes
    world_size = get_world_size()
    with progress("episodes", total, enabled=show_progress and get_rank() == 0) as advance:
        for n_way, k_shot in protocol.combinations():
            episodes = _sample_episodes(first, protocol, n_way, k_shot)
            for classifier in protocol.classifiers:
                block = []
                for f in features:
                    scores = _evaluate_over_ranks(f, episodes, classifier, protocol, lambda n: advance(n * world_size))
                    block.append(Row(f.network, f.input_mode, scores, {**_origin(f), **summarize(scores)}))
                rows += block
                differences += [_difference(a, b) for i, a in enumerate(block) for b in block[i + 1 :]]
    num_not_converged = sum(row.scores.num_not_converged for row in rows)
    if num_not_converged:
        log.warning("%s did not converge", format_count(num_not_converged, "logistic regression"))
    probes = [_probe(f, protocol) for f in features] if protocol.probe else []
    return Results(protocol, features, tuple(rows), tuple(differences), tuple(probes))


def _check_features(features: tuple[Features, ...]) -> Features:
    if not features:
        raise FewshotError("no features to evaluate")
    names = [(f.network, f.input_mode) for f in features]
    for f in features[1:]:
        if not f.has_same_clips(features[0]):
            raise FewshotError(f"{f.network} and {features[0].network} have features of different clips")
    if len(set(names)) != len(names):
        raise FewshotError(f"two networks have the same name and input mode: {', '.join(map(str, names))}")
    return features[0]


def _sample_episodes(clips: Features, protocol: Protocol, n_way: int, k_shot: int) -> Episodes:
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
    f: Features, episodes: Episodes, classifier: str, protocol: Protocol, advance: Callable[[int], None]
) -> EpisodeScores:
    rank, world_size, workers = get_rank(), get_world_size(), protocol.workers
    if workers is None and world_size > 1:  # the ranks of one machine share its processors
        workers = max(1, default_num_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))

    def evaluate(part: Episodes) -> EpisodeScores:
        return evaluate_episodes(
            f.features, part, classifier, workers=workers, support_views=protocol.support_views, advance=advance
        )

    if world_size == 1:
        return evaluate(episodes)
    shard = episodes.shard(rank, world_size)
    parts = all_gather_objects(evaluate(shard) if len(shard) else None)
    return merge_scores([part for part in parts if part is not None], episodes)


def _origin(f: Features) -> dict[str, Any]:
    keys = ("checkpoint", "modality", "eval_masks", "n_masks", "eval_mask_ratio", "seconds", "cached")
    return {"network": f.network, "input_mode": f.input_mode, **{k: f.info[k] for k in keys if k in f.info}}


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
    accuracies = probe_full_label_set(f.features, f.labels, groups=f.groups, seed=protocol.seed)
    return {"network": f.network, "input_mode": f.input_mode, **accuracies}
