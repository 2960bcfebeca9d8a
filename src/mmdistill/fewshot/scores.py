"""Accuracy, intervals, paired differences, per-class accuracy and confusion from features and episodes.

Accuracies are fractions in [0, 1] here and in JSON files; tables and pages print percent.

Shapes: E episodes, V views, N ways, Q queries per class, D width, C classes of the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmdistill.errors import format_count
from mmdistill.fewshot.classifiers import PredictOptions, get_classifier, ignore_progress
from mmdistill.fewshot.episodes import Episodes, FloatArray, IntArray
from mmdistill.fewshot.errors import FeatureError, FewshotError

SUPPORT_VIEWS = ("each", "first")


@dataclass(frozen=True)
class EpisodeScores:
    """Predictions of one classifier on the features of one network.

    Attributes:
        episodes: the evaluated episodes.
        predictions: int64 (E, N * Q), positions 0..N-1 in `episodes.classes`; queries in the order of `episodes.query`.
        accuracy: float64 (E,), fraction of correct predictions of each episode.
        classifier: name of the classifier.
        num_not_converged: number of fits that did not converge.
    """

    episodes: Episodes
    predictions: IntArray
    accuracy: NDArray[np.float64]
    classifier: str
    num_not_converged: int = 0


def as_views(features: ArrayLike) -> FloatArray:
    """Features as float32 (clips, V, D); (clips, D) is one view. Raises `FeatureError` if they are invalid."""
    given = np.asarray(features)
    if given.dtype.kind not in "fiu":
        raise FeatureError(f"features must be numbers, got the type {given.dtype}")
    x = np.ascontiguousarray(given, dtype=np.float32)
    if x.ndim == 2:
        x = x[:, None]
    if x.ndim != 3 or 0 in x.shape:
        raise FeatureError(f"features must be [clips, D] or [clips, views, D], got the shape {np.shape(features)}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))
    if len(bad):
        where = f"{len(bad)} of {format_count(len(x), 'clip')}, the first at {bad[:5].tolist()}"
        raise FeatureError(f"features: NaN or infinite values in {where}")
    return x


def evaluate_episodes(
    features: ArrayLike,
    episodes: Episodes,
    classifier: str,
    *,
    support_views: str = "each",
    workers: int | None = None,
    advance: Callable[[int], None] = ignore_progress,
) -> EpisodeScores:
    """Classify the queries of every episode.

    With V views this is MM-CDFSL's ensemble inference over masks (arXiv 2405.19917, section 3.4): class probabilities
    are averaged over views, and the class with the largest probability is predicted.

    `features` are (clips, D) or (clips, V, D). With ``support_views="each"`` view v of a query is classified by a
    classifier fitted to view v of the support clips, with "first" by one fitted to the first view, as in the paper's
    release. See `PredictOptions` for `workers` and `advance`.

    Raises:
        FewshotError: features that are not finite, an unknown classifier, indices outside the features.
    """
    x = as_views(features)
    if support_views not in SUPPORT_VIEWS:
        raise FewshotError(f"support_views={support_views!r} is not one of {', '.join(SUPPORT_VIEWS)}")
    highest = max(int(episodes.support.max()), int(episodes.query.max()))
    if highest >= len(x):
        raise FewshotError(
            f"the episodes contain clip {highest}, but there are features of only {format_count(len(x), 'clip')}"
        )
    options = PredictOptions(support_views == "first", workers, advance)
    predictions, num_not_converged = get_classifier(classifier).predict(x, episodes, options)
    accuracy = (predictions == episodes.targets).mean(axis=1)
    return EpisodeScores(episodes, predictions, accuracy, classifier, num_not_converged)


def merge_scores(parts: Sequence[EpisodeScores], episodes: Episodes) -> EpisodeScores:
    """Scores of the shards of `episodes`. Raises `FewshotError` if an episode is missing or occurs twice."""
    numbers = np.concatenate([p.episodes.numbers for p in parts])
    if not np.array_equal(np.sort(numbers), episodes.numbers):
        raise FewshotError(
            f"the shards contain {format_count(len(numbers), 'episode')}, {len(np.unique(numbers))} distinct, of "
            f"{len(episodes)}"
        )
    rows = np.argsort(numbers)
    predictions, accuracy = (np.concatenate([getattr(p, n) for p in parts])[rows] for n in ("predictions", "accuracy"))
    return EpisodeScores(episodes, predictions, accuracy, parts[0].classifier, sum(p.num_not_converged for p in parts))


def mean_with_interval(values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Mean, standard deviation, standard error, half width of the 95 % interval (Student's t) of episode values."""
    from scipy import stats  # not at the start of a training or evaluation

    if len(values) < 2:
        raise FewshotError(f"{len(values)} episode has no standard error; draw at least 2")
    std = float(values.std(ddof=1))
    error = std / float(np.sqrt(len(values)))
    return float(values.mean()), std, error, float(stats.t.ppf(0.975, len(values) - 1)) * error


def summarize(scores: EpisodeScores) -> dict[str, Any]:
    """The numbers of one row, as plain values.

    `top1_action_ensemble` is the mean accuracy (a fraction), `..._std` the standard deviation over episodes,
    `..._std_error` that of the mean, `ci95` the half width of its 95 % interval.
    """
    mean, std, error, ci95 = mean_with_interval(scores.accuracy)
    episodes = scores.episodes
    return {
        "top1_action_ensemble": mean,
        "top1_action_ensemble_std": std,
        "top1_action_ensemble_std_error": error,
        "ci95": ci95,
        "episodes": len(episodes),
        "n_way": episodes.n_way,
        "k_shot": episodes.k_shot,
        "q_sample": episodes.q_sample,
        "classes": len(episodes.eligibility.classes) or len(np.unique(episodes.classes)),
        "classes_excluded": len(episodes.eligibility.excluded),
        "classifier": scores.classifier,
        "seed": episodes.seed,
        "disjoint": episodes.eligibility.disjoint,
        "num_not_converged": scores.num_not_converged,
    }


def paired_difference(a: EpisodeScores, b: EpisodeScores) -> dict[str, float]:
    """Mean of accuracy(a) - accuracy(b) over the same episodes, with its 95 % interval (`ci95`: half width), fractions.

    Raises:
        FewshotError: the episodes are not the same.
    """
    if not a.episodes.has_same_clips(b.episodes):
        raise FewshotError("a paired difference needs the same episodes of the same clips on both sides")
    mean, _, error, ci95 = mean_with_interval(a.accuracy - b.accuracy)
    return {"difference": mean, "std_error": error, "ci95": ci95, "low": mean - ci95, "high": mean + ci95}


def count_confusions(scores: EpisodeScores, num_classes: int) -> tuple[IntArray, IntArray]:
    """Confusion over all episodes.

    Returns:
        counts int64 (C, C): queries of class i (row) predicted as class j (column); and possible int64 (C, C): queries
        of class i in episodes that contain class j. counts / possible is comparable between classes, counts is not.
    """
    episodes = scores.episodes
    true = np.repeat(episodes.classes, episodes.q_sample, axis=1)  # (E, N * Q)
    predicted = np.take_along_axis(episodes.classes, scores.predictions, axis=1)
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    possible = np.zeros_like(counts)
    np.add.at(counts, (true, predicted), 1)
    np.add.at(possible, (episodes.classes[:, :, None], episodes.classes[:, None, :]), episodes.q_sample)
    return counts, possible


def per_class_accuracy(scores: EpisodeScores, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy of each class over all of its queries, by name: {"accuracy": fraction, "queries": number}."""
    counts, _ = count_confusions(scores, len(names))
    queries = counts.sum(axis=1)
    return {
        names[c]: {"accuracy": float(counts[c, c] / queries[c]), "queries": int(queries[c])}
        for c in np.flatnonzero(queries).tolist()
    }
