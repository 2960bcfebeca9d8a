"""Report card: few-shot accuracy of each element of the labels and of the exact label, also by part of the clips.

Each element has its own episodes, whose classes are the values of the element. A part is a set of clips, such as all
strokes of the far player. The accuracy of a part is that of its query clips; support clips come from all parts.

Shapes: E episodes, N ways, Q queries per class.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmdistill.data.annotations.f3set import F3SET_FIELDS
from mmdistill.data.clips import ClipSource
from mmdistill.errors import format_count
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, IntArray, disjoint_groups, eligible_classes
from mmdistill.fewshot.errors import EpisodeError, FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.scores import EpisodeScores, summarize
from mmdistill.fewshot.spotting_head import LabelElements

EXACT_LABEL = "exact label"
_NO_VALUE = "-"  # of an element that does not exist, such as the technique of a serve
_NO_VALUE_IS_CLASS = ("approach",)  # its values are approach and no approach

Draw = Callable[[EpisodeSpec, IntArray, Sequence[str]], Episodes]
"""(composition, labels, names of the label values) -> episodes"""
Score = Callable[[Features, Episodes], EpisodeScores]


@dataclass(frozen=True)
class ElementScores:
    """One row of the report card.

    Attributes:
        element: name of the element, or `EXACT_LABEL`.
        counts: number of clips by value of the element.
        not_scored: why there is no score; "" if there is one.
        scores: one per network.
        parts: for each network, by part: accuracy, ci95 (fractions) and number of queries; see `part_accuracy`.
    """

    element: str
    counts: Mapping[str, int]
    not_scored: str = ""
    scores: tuple[EpisodeScores, ...] = ()
    parts: tuple[dict[str, dict[str, float]], ...] = ()


@dataclass(frozen=True)
class ReportCard:
    """The scores of all elements, the exact label last. `networks` are the scored network and the baselines."""

    networks: tuple[str, ...]
    elements: tuple[ElementScores, ...]

    def to_json(self) -> dict[str, Any]:
        """All scores as plain values, by element and network."""
        return {
            row.element: {
                "clips": dict(row.counts),
                **(
                    {"not_scored": row.not_scored}
                    if row.not_scored
                    else {
                        "networks": {
                            network: {**summarize(scores), "parts": parts}
                            for network, scores, parts in zip(self.networks, row.scores, row.parts, strict=True)
                        }
                    }
                ),
            }
            for row in self.elements
        }


def element_values(sources: Sequence[ClipSource]) -> dict[str, list[str]]:
    """The value of each element for each clip, by element; "" where the clip has none.

    Raises:
        FewshotError: no clip has a label, or the labels have different numbers of fields.
    """
    labels = [source.label for source in sources if source.label]
    if not labels:
        raise FewshotError(
            "the report card needs clips of labeled events, and no clip has a label; set "
            "data_module.eval_clips=events, or write the features again with `mmdistill features`"
        )
    counts = Counter(len(label.split("_")) for label in labels)
    if len(counts) > 1:
        rarest = min(counts, key=lambda count: counts[count])
        example = next(label for label in labels if len(label.split("_")) == rarest)
        found = ", ".join(f"{number} with {format_count(count, 'field')}" for count, number in counts.most_common())
        raise FewshotError(
            f"the report card needs labels with the same number of fields ({found}, for example {example!r}); correct "
            "the labels, or omit the report card"
        )
    elements = LabelElements.of(labels)
    values: dict[str, list[str]] = {name: [] for name in elements.names}
    for source in sources:
        parts = elements.split(source.label) if source.label else ("",) * len(elements.names)
        for name, value in zip(elements.names, parts, strict=True):
            values[name].append("" if value == _NO_VALUE and name not in _NO_VALUE_IS_CLASS else value)
    return values


def clip_parts(sources: Sequence[ClipSource], values: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The parts of each clip, one list of clips for each division: player, hand, serve or not, court side.

    Only labels with F3Set's eight fields tell player, serve and court side. "" is a clip in no part.
    """
    hands = [f"hand {source.hand}" if source.hand else "" for source in sources]
    if tuple(values) != F3SET_FIELDS:
        return [hands]
    return [
        [f"{value} player" if value else "" for value in values["player"]],
        hands,
        [("serve" if value == "serve" else "no serve") if value else "" for value in values["type"]],
        [f"court {value}" if value else "" for value in values["court"]],
    ]


def part_accuracy(scores: EpisodeScores, parts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy of the queries of each part, over all episodes.

    `parts` has the part of each clip; "" is no part. The accuracy is the number of correct queries / the number of
    queries. Its 95 % interval is that of a ratio of two sums over episodes (linearized; Cochran, Sampling Techniques,
    chapter 6). If each episode has the same number of queries, it is the interval of the mean over episodes.

    Returns:
        by part: `accuracy` and `ci95` (half width) as fractions, `queries`. Parts without queries are omitted.
    """
    from scipy import stats  # not at the start of an evaluation

    episodes = scores.episodes
    correct = scores.predictions == episodes.targets  # (E, N * Q)
    part_of = np.asarray(parts)[episodes.query.reshape(len(episodes), -1)]
    found = {}
    for part in sorted(set(part_of.ravel().tolist()) - {""}):
        is_part = part_of == part
        queries, hits = is_part.sum(axis=1), (is_part & correct).sum(axis=1)  # (E,)
        accuracy = hits.sum() / queries.sum()
        variance = np.square(hits - accuracy * queries).sum() / (len(episodes) - 1)
        error = np.sqrt(variance * len(episodes)) / queries.sum()
        ci95 = float(stats.t.ppf(0.975, len(episodes) - 1) * error)
        found[part] = {"accuracy": float(accuracy), "ci95": ci95, "queries": int(queries.sum())}
    return found


def score_elements(
    networks: Sequence[Features], spec: EpisodeSpec, exact: Sequence[EpisodeScores], *, draw: Draw, score: Score
) -> ReportCard:
    """Score all elements of the labels for the networks, which have the same clips and known sources.

    An element with fewer than N usable values has episodes of all its values. `exact` are the scores of the exact
    label, one per network.

    Raises:
        FewshotError: see `element_values`.
    """
    clips = networks[0]
    values = element_values(clips.sources)
    divisions = clip_parts(clips.sources, values)

    def make_row(name: str, counts: Mapping[str, int], scores: Sequence[EpisodeScores]) -> ElementScores:
        parts = tuple({k: v for parts in divisions for k, v in part_accuracy(s, parts).items()} for s in scores)
        return ElementScores(name, counts, "", tuple(scores), parts)

    rows = []
    for name, texts in values.items():
        classes = sorted(set(texts) - {""})
        labels = np.array([classes.index(text) if text else -1 for text in texts], dtype=np.int64)
        labels[clips.labels < 0] = -1  # clips that the evaluation does not draw either
        counts = {value: int((labels == number).sum()) for number, value in enumerate(classes)}
        if sum(count > 0 for count in counts.values()) < 2:
            only = f"1 class ({classes[0]})" if classes else "no class"
            rows.append(ElementScores(name, counts, f"not scored: {only}"))
            continue
        try:
            episodes = _draw_element(labels, spec, classes, clips, draw)
        except EpisodeError as error:
            rows.append(ElementScores(name, counts, f"not scored: {error}"))
            continue
        rows.append(make_row(name, counts, [score(network, episodes) for network in networks]))
    exact_counts = {name: int((clips.labels == number).sum()) for number, name in enumerate(clips.classes)}
    return ReportCard(tuple(f.network for f in networks), (*rows, make_row(EXACT_LABEL, exact_counts, exact)))


def _draw_element(labels: IntArray, spec: EpisodeSpec, classes: Sequence[str], clips: Features, draw: Draw) -> Episodes:
    """Episodes of min(N, number of values with enough clips) ways. Raises `EpisodeError` if this is below 2."""
    groups = disjoint_groups(spec.disjoint, clips.groups, clips.sources, labels)
    eligible = eligible_classes(labels, replace(spec, n_way=2), groups=groups, names=classes).classes
    return draw(replace(spec, n_way=min(spec.n_way, len(eligible))), labels, classes)
