"""The complete evaluation: every network, N-way, K-shot and classifier on the same episodes, and the results."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmdistill.console import progress
from mmdistill.data.clips import ClipSource
from mmdistill.distributed.collectives import all_gather_objects, get_rank, get_world_size
from mmdistill.errors import format_count
from mmdistill.fewshot.classifiers import get_classifier, ignore_progress
from mmdistill.fewshot.episodes import (
    Eligibility,
    Episodes,
    EpisodeSpec,
    IntArray,
    disjoint_groups,
    eligible_classes,
    sample_episodes,
)
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.logistic import default_num_workers
from mmdistill.fewshot.probe import probe_full_label_set, split_by_group
from mmdistill.fewshot.report_card import ReportCard, Score, element_values, score_elements
from mmdistill.fewshot.scores import EpisodeScores, evaluate_episodes, merge_scores, paired_difference, summarize
from mmdistill.fewshot.shortcut_audit import LEVELS, ShortcutAudit, audit_shortcuts

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
        disjoint: see `EpisodeSpec`.
        support_views: see `evaluate_episodes`.
        probe: also classify the full label set (linear probe, k-NN).
        report_card: also score each element of the labels; see `report_card`.
        shortcut_audit: also score episodes that are disjoint by rally, match and player; see `shortcut_audit`.
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
    report_card: bool = False
    shortcut_audit: bool = False

    def __post_init__(self) -> None:
        for name in ("n_way", "k_shot", "classifiers"):
            if not getattr(self, name):
                raise FewshotError(f"{name} is empty")
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if self.episodes < 2:
            raise FewshotError(f"episodes={self.episodes} must be at least 2: one episode has no standard error")
        for classifier in self.classifiers:
            get_classifier(classifier)

    def check(
        self,
        labels: Sequence[int],
        videos: Sequence[str],
        names: Sequence[str],
        sources: Sequence[ClipSource] = (),
    ) -> list[str]:
        """Check before encoding that these labels supply the episodes. Returns one log line per combination.

        `sources` are those of the clips; `report_card` and ``disjoint=match|player`` need them.

        Raises:
            EpisodeError: fewer than N classes have enough clips, or no draw with disjoint groups is found.
            FewshotError: the probe cannot be split by video, or the clips have no labels for the report card.
        """
        if self.probe:
            split_by_group(np.asarray(labels, dtype=np.int64), videos, seed=self.seed)
        if self.report_card:
            element_values(sources)
        lines = []
        groups = disjoint_groups(self.disjoint, videos, sources, labels)
        for spec in self.specs():
            found = eligible_classes(list(labels), spec, groups=groups, names=names)
            if self.disjoint:  # a draw can be impossible for several classes together
                self.sample(spec, list(labels), groups, names)
            lines.append(describe_eligibility(spec, found, names))
        if sources and (self.disjoint in ("match", "player") or self.shortcut_audit):
            unnamed = {v for v, source in zip(videos, sources, strict=True) if source.match == v}
            if unnamed:
                lines.append(
                    f"{len(unnamed)} of {format_count(len(set(videos)), 'video')} count as matches of their own: their "
                    "names do not end with the numbers of the first and the last frame (MATCH_START_END)"
                )
        return lines

    def specs(self) -> list[EpisodeSpec]:
        """The episodes of every combination of N-way and K-shot."""
        return [EpisodeSpec(n, k, self.q_sample, self.disjoint) for n in self.n_way for k in self.k_shot]

    def sample(self, spec: EpisodeSpec, labels: ArrayLike, groups: Sequence[object], names: Sequence[str]) -> Episodes:
        """Draw the episodes of one combination; see `sample_episodes`."""
        return sample_episodes(labels, spec, episodes=self.episodes, seed=self.seed, groups=groups, names=names)


def describe_eligibility(spec: EpisodeSpec | Episodes, found: Eligibility, names: Sequence[str]) -> str:
    """One line about the eligible and the excluded classes of episodes."""
    size = f"{spec.n_way}-way {spec.k_shot}-shot, {format_count(spec.q_sample, 'query')} per class"
    line = f"{size}: {format_count(len(found.classes), 'eligible class')}"
    return "; ".join(filter(None, (line, found.describe(names))))


@dataclass(frozen=True)
class Row:
    """One network in one input mode, with one combination of N-way and K-shot and one classifier."""

    network: str
    input_mode: str
    scores: EpisodeScores
    summary: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The rows of one combination and classifier, which have the same episodes; the scored network first."""

    n_way: int
    k_shot: int
    classifier: str
    rows: tuple[Row, ...]

    def difference_to_scored(self, row: Row) -> dict[str, float] | None:
        """The paired difference of the scored network minus this row's network; None for the scored network."""
        return None if row is self.rows[0] else paired_difference(self.rows[0].scores, row.scores)


@dataclass(frozen=True)
class Results:
    """All results; `evaluation.report` writes them as tables, JSON and a page.

    Attributes:
        protocol: the settings.
        features: of each network and input mode, the scored network first.
        settings: in the order combination, classifier.
        probes: full label set, one per network and input mode.
        report_card: of the first combination and classifier, in the input mode of the scored network; None: not
            computed.
        shortcut_audit: as `report_card`.
    """

    protocol: Protocol
    features: tuple[Features, ...]
    settings: tuple[Setting, ...]
    probes: tuple[dict[str, Any], ...] = ()
    report_card: ReportCard | None = None
    shortcut_audit: ShortcutAudit | None = None

    @property
    def headline(self) -> Row:
        """The scored network with the first combination and classifier."""
        return self.settings[0].rows[0]


def run_protocol(
    features: Sequence[Features], protocol: Protocol, *, workers: int | None = None, show_progress: bool = True
) -> Results:
    """Evaluate features of several networks and input modes, the scored network first, on the same episodes.

    Each rank of a process group evaluates its share of the episodes, and all ranks return the same results. `workers`
    is the number of processes of the logistic regression; None: all processors.

    Raises:
        FewshotError: the clips differ, two entries have the same name and input mode, or the labels do not supply the
            episodes.
    """
    if not features:
        raise FewshotError("no features to evaluate")
    clips, names = features[0], [(f.network, f.input_mode) for f in features]
    for f in features:
        if not f.has_same_clips(clips):
            raise FewshotError(f"{f.network} and {clips.network} have features of different clips")
    if len(set(names)) != len(names):
        raise FewshotError(f"two networks have the same name and input mode: {', '.join(map(str, names))}")
    rank, world_size = get_rank(), get_world_size()
    if workers is None and world_size > 1:  # the ranks of one machine share its processors
        workers = max(1, default_num_workers() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    show_progress = show_progress and rank == 0
    score = partial(_score_on_all_ranks, protocol=protocol, workers=workers)
    total = len(protocol.specs()) * len(protocol.classifiers) * len(features) * protocol.episodes
    settings, probes = [], []
    with progress("episodes", total, enabled=show_progress) as advance:
        for spec in protocol.specs():
            groups = disjoint_groups(spec.disjoint, clips.groups, clips.sources, clips.labels)
            episodes = protocol.sample(spec, clips.labels, groups, clips.classes)
            for classifier in protocol.classifiers:
                rows = []
                for f in features:
                    scores = score(f, episodes, classifier=classifier, advance=lambda n: advance(n * world_size))
                    rows.append(Row(f.network, f.input_mode, scores, {**_origin(f), **summarize(scores)}))
                settings.append(Setting(spec.n_way, spec.k_shot, classifier, tuple(rows)))
    num_not_converged = sum(row.scores.num_not_converged for setting in settings for row in setting.rows)
    if num_not_converged:
        log.warning("%s did not converge", format_count(num_not_converged, "logistic regression"))
    for f in features if protocol.probe else ():
        accuracies = probe_full_label_set(f.features, f.labels, groups=f.groups, seed=protocol.seed)
        probes.append({"network": f.network, "input_mode": f.input_mode, **accuracies})
    results = Results(protocol, tuple(features), tuple(settings), tuple(probes))
    return _with_breakdowns(results, partial(score, classifier=protocol.classifiers[0]), show_progress=show_progress)


def _score_on_all_ranks(
    f: Features,
    episodes: Episodes,
    *,
    classifier: str,
    protocol: Protocol,
    workers: int | None,
    advance: Callable[[int], None] = ignore_progress,
) -> EpisodeScores:
    """Evaluate the episodes, each rank its share. All ranks return the same scores."""
    shard = episodes.shard(get_rank(), get_world_size())
    part = None
    if len(shard):
        views = protocol.support_views
        part = evaluate_episodes(f.features, shard, classifier, support_views=views, workers=workers, advance=advance)
    return merge_scores([p for p in all_gather_objects(part) if p is not None], episodes)


def _with_breakdowns(results: Results, score: Score, *, show_progress: bool) -> Results:
    """Add the report card and the shortcut audit of the first combination, if the protocol requests them.

    They contain each network once, the scored network in the input mode of the headline.
    """
    protocol, clips = results.protocol, results.features[0]
    networks = list({f.network: f for f in reversed(results.features)}.values())[::-1]  # the first one of each name
    spec, card, audit = protocol.specs()[0], None, None

    def draw(spec: EpisodeSpec, labels: IntArray, names: Sequence[str]) -> Episodes:
        groups = disjoint_groups(spec.disjoint, clips.groups, clips.sources, labels)
        return protocol.sample(spec, labels, groups, names)

    if protocol.report_card:
        rows = {(row.network, row.input_mode): row.scores for row in results.settings[0].rows}
        exact = [rows[f.network, f.input_mode] for f in networks]
        total = len(networks) * len(element_values(clips.sources))
        with progress("report card", total, enabled=show_progress) as advance:
            card = score_elements(networks, spec, exact, draw=draw, score=_advancing(score, advance))
    if protocol.shortcut_audit:
        with progress("shortcut audit", len(networks) * len(LEVELS), enabled=show_progress) as advance:
            audit = audit_shortcuts(
                networks,
                spec,
                draw=lambda level, labels: draw(replace(spec, disjoint=level), labels, clips.classes),
                score=_advancing(score, advance),
            )
    return replace(results, report_card=card, shortcut_audit=audit)


def _advancing(score: Score, advance: Callable[[int], None]) -> Score:
    """`score` that advances a progress bar by one after each call."""

    def score_and_advance(f: Features, episodes: Episodes) -> EpisodeScores:
        scores = score(f, episodes)
        advance(1)
        return scores

    return score_and_advance


def _origin(f: Features) -> dict[str, Any]:
    keys = ("checkpoint", "modality", "eval_masks", "n_masks", "eval_mask_ratio", "seconds", "cached")
    return {"network": f.network, "input_mode": f.input_mode, **{k: f.info[k] for k in keys if k in f.info}}
