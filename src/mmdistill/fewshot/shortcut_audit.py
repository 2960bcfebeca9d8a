"""Shortcut audit: the same evaluation with episodes that are disjoint by rally, match and player, side by side.

A network can recognize the rally, the court or the player of a clip instead of its stroke. Episodes whose support and
query clips have no rally, match or player in common do not reward this. All levels use the same classes in each
episode, so that the differences between levels are paired by episode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mmdistill.data.clips import DISJOINT
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, IntArray
from mmdistill.fewshot.errors import EpisodeError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.scores import EpisodeScores, mean_with_interval, summarize

LEVELS: tuple[str | None, ...] = (None, *DISJOINT)  # values of `disjoint`
SAME_AS_RALLY = "each match has one rally, so that the episodes are those of disjoint rallies"

DrawLevel = Callable[[str | None, IntArray], Episodes]
"""(value of `disjoint`, labels) -> episodes"""
Score = Callable[[Features, Episodes], EpisodeScores]


@dataclass(frozen=True)
class AuditLevel:
    """The scores with one value of `disjoint`; `not_possible` is the reason if there are none."""

    disjoint: str | None
    scores: tuple[EpisodeScores, ...] = ()  # one per network
    not_possible: str = ""


@dataclass(frozen=True)
class ShortcutAudit:
    """Scores of all levels. `networks` are the scored network and the baselines."""

    networks: tuple[str, ...]
    spec: EpisodeSpec
    num_classes: int  # classes that episodes of every possible level can have
    levels: tuple[AuditLevel, ...]

    def explained(self, network: int) -> dict[str, dict[str, float | None]]:
        """How much of the accuracy of a network with disjoint rallies is lost at the stricter levels, as fractions.

        Keys: ``match`` (disjoint rallies - matches), ``player`` (disjoint matches - players; if the matches are the
        rallies or unknown, rallies - players), ``together`` (disjoint rallies - the strictest level). Each has
        ``difference``, ``ci95``, and ``share`` of the accuracy above chance (None if the 95 % interval of the accuracy
        contains chance).
        """
        accuracy = {level.disjoint: level.scores[network].accuracy for level in self.levels if level.scores}
        if "video" not in accuracy:
            return {}
        steps = [name for name in DISJOINT if name in accuracy]
        pairs = {after: (before, after) for before, after in pairwise(steps)}
        if pairs:
            pairs["together"] = ("video", steps[-1])
        mean, _, _, interval = mean_with_interval(accuracy["video"])
        above = mean - 1 / self.spec.n_way
        found: dict[str, dict[str, float | None]] = {}
        for key, (before, after) in pairs.items():
            difference, _, _, ci95 = mean_with_interval(accuracy[before] - accuracy[after])
            share = difference / above if above > interval else None
            found[key] = {"difference": difference, "ci95": ci95, "share": share}
        return found

    def to_json(self) -> dict[str, Any]:
        """All scores as plain values, by level and network."""
        return {
            "n_way": self.spec.n_way,
            "k_shot": self.spec.k_shot,
            "q_sample": self.spec.q_sample,
            "classes": self.num_classes,
            "levels": {
                level.disjoint or "any": {
                    network: summarize(scores) for network, scores in zip(self.networks, level.scores, strict=True)
                }
                for level in self.levels
                if level.scores
            },
            "not_possible": {level.disjoint or "any": level.not_possible for level in self.levels if not level.scores},
            "explained": {network: self.explained(i) for i, network in enumerate(self.networks)},
        }


def audit_shortcuts(networks: Sequence[Features], spec: EpisodeSpec, *, draw: DrawLevel, score: Score) -> ShortcutAudit:
    """Score the networks at all levels; `spec.disjoint` has no effect. Levels without episodes have a reason instead.

    The classes are those that can have episodes at the strictest possible level.
    """
    clips = networks[0]
    labels, num_classes = clips.labels, 0
    matches = {clips.sources[i].match for i in np.flatnonzero(labels >= 0)} if clips.sources else set()
    videos = {clips.groups[i] for i in np.flatnonzero(labels >= 0)}
    drawn: dict[str | None, Episodes | str] = {}
    for level in reversed(LEVELS):
        if level == "match" and len(matches) == len(videos):
            drawn[level] = SAME_AS_RALLY
            continue
        try:
            episodes = drawn[level] = draw(level, labels)
        except EpisodeError as error:
            drawn[level] = str(error)
            continue
        if not num_classes:
            num_classes = len(episodes.eligibility.classes)
            labels = np.where(np.isin(labels, episodes.eligibility.classes), labels, -1)
    levels = [
        AuditLevel(level, not_possible=found)
        if isinstance(found, str)
        else AuditLevel(level, tuple(score(network, found) for network in networks))
        for level, found in reversed(drawn.items())
    ]
    return ShortcutAudit(tuple(f.network for f in networks), spec, num_classes, tuple(levels))
