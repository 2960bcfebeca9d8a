"""The errors of an evaluation: wrongly classified query clips, their nearest support clips, differing elements.

Shapes: E episodes, N ways, K shots, Q queries per class, V views, D width.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdistill.fewshot.episodes import FloatArray, IntArray
from mmdistill.fewshot.scores import EpisodeScores
from mmdistill.fewshot.spotting_head import LabelElements


@dataclass(frozen=True)
class Neighbor:
    """A support clip near a query clip."""

    clip: int  # position in the features
    class_value: int
    similarity: float  # cosine of the features, each averaged over the views


@dataclass(frozen=True)
class QueryError:
    """A clip that was wrong as a query clip.

    Attributes:
        clip: position in the features.
        true_class, predicted_class: label values; the predicted class is the most frequent wrong one.
        num_queries, num_wrong: number of episodes with this query, and of those that classify it wrongly.
        episode: number of the first episode that predicts `predicted_class`.
        neighbors: the most similar support clips of that episode, the most similar one first. The most similar support
            clip of the true class is added if it is not one of them.
    """

    clip: int
    true_class: int
    predicted_class: int
    num_queries: int
    num_wrong: int
    episode: int
    neighbors: tuple[Neighbor, ...]


def find_query_errors(features: FloatArray, scores: EpisodeScores, *, num_neighbors: int = 3) -> list[QueryError]:
    """All clips that were wrong as a query, the most wrong predictions first. `features` are (clips, V, D)."""
    episodes = scores.episodes
    query = episodes.query.reshape(len(episodes), -1)  # (E, N * Q)
    true, predicted = _true_and_predicted(scores)
    num_queries = np.bincount(query.ravel(), minlength=len(features))
    wrong_classes: dict[int, Counter[int]] = {}
    first_episode: dict[tuple[int, int], int] = {}
    for e, q in np.argwhere(true != predicted).tolist():
        clip, value = int(query[e, q]), int(predicted[e, q])
        wrong_classes.setdefault(clip, Counter())[value] += 1
        first_episode.setdefault((clip, value), e)
    unit = features.mean(axis=1)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    found = []
    for clip, counts in wrong_classes.items():
        value, _ = counts.most_common(1)[0]
        e = first_episode[clip, value]
        true_class = int(true[e][query[e] == clip][0])
        support, classes = episodes.support[e].ravel(), np.repeat(episodes.classes[e], episodes.k_shot)
        neighbors = _nearest(unit[support] @ unit[clip], support, classes, true_class, num_neighbors)
        number = int(episodes.numbers[e])
        found.append(QueryError(clip, true_class, value, int(num_queries[clip]), counts.total(), number, neighbors))
    return sorted(found, key=lambda error: (-error.num_wrong, error.num_queries, error.clip))


def _true_and_predicted(scores: EpisodeScores) -> tuple[IntArray, IntArray]:
    """Label values of all queries, int64 (E, N * Q) each."""
    classes = scores.episodes.classes
    true = np.repeat(classes, scores.episodes.q_sample, axis=1)
    return true, np.take_along_axis(classes, scores.predictions, axis=1)


def _nearest(
    similarity: FloatArray, support: IntArray, classes: IntArray, true_class: int, count: int
) -> tuple[Neighbor, ...]:
    """The `count` most similar support clips, and the most similar one of the true class."""
    order = np.argsort(-similarity, kind="stable").tolist()
    chosen = order[:count]
    chosen += [i for i in order if classes[i] == true_class][:1] if true_class not in classes[chosen] else []
    return tuple(Neighbor(int(support[i]), int(classes[i]), float(similarity[i])) for i in chosen)


@dataclass(frozen=True)
class ElementErrors:
    """How often an element of the label differs between the predicted and the true class of wrong predictions.

    `share` is the fraction of the wrong predictions. `expected` is the same fraction if the wrong class were drawn at
    random from the other classes of the episode.
    """

    element: str
    share: float
    expected: float


def count_element_errors(scores: EpisodeScores, classes: Sequence[str], elements: LabelElements) -> list[ElementErrors]:
    """The elements in the order of the label; empty if no prediction is wrong. `classes` are names of label values."""
    parts = [elements.split(name) for name in classes]
    codes = np.stack([np.unique(values, return_inverse=True)[1] for values in zip(*parts, strict=True)])
    true, predicted = _true_and_predicted(scores)
    episode, position = np.nonzero(true != predicted)
    if not len(episode):
        return []
    wrong_true, wrong_predicted = true[episode, position], predicted[episode, position]
    others = scores.episodes.classes[episode]  # (wrong, N); the true class differs in no element
    found = []
    for name, values in zip(elements.names, codes, strict=True):
        differs = values[others] != values[wrong_true][:, None]
        share = float((values[wrong_predicted] != values[wrong_true]).mean())
        found.append(ElementErrors(name, share, float((differs.sum(axis=1) / (others.shape[1] - 1)).mean())))
    return found


def mark_differences(label: str, reference: str) -> list[tuple[str, bool]]:
    """The elements of a label, and whether each differs from that of `reference`.

    Labels with different numbers of elements are compared as a whole.
    """
    parts, others = label.split("_"), reference.split("_")
    if len(parts) != len(others):
        return [(label, label != reference)]
    return [(part, part != other) for part, other in zip(parts, others, strict=True)]
