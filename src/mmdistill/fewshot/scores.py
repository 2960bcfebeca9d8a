"""From features and episodes to numbers: accuracy, intervals, paired differences, per-class accuracy, confusion.

Accuracies are fractions in [0, 1] here and in JSON files; tables and pages print percent.

Shapes: E episodes, V views, N ways, Q queries per class, D width, C classes of the data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from mmdistill.fewshot.classifiers import Head, find_head, predict_batched
from mmdistill.fewshot.episodes import Episodes
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.fewshot.logistic import FloatArray, predict_logistic

SUPPORT_VIEWS = ("each", "first")


@dataclass(frozen=True)
class EpisodeScores:
    """What one head answered on features of one network.

    Attributes:
        episodes: the episodes asked.
        predictions: int64 (E, N * Q), positions 0..N-1 in `episodes.classes`; queries in the order of `episodes.query`.
        accuracy: float64 (E,), fraction of right answers of each episode.
        head: its name.
        stopped: fits of the logistic head that ended before they converged.
    """

    episodes: Episodes
    predictions: NDArray[np.int64]
    accuracy: NDArray[np.float64]
    head: str
    stopped: int = 0


def as_views(features: ArrayLike, *, source: str = "features") -> FloatArray:
    """Features as finite float32 (clips, V, D); (clips, D) is one view.

    Raises:
        FeatureError: another type or shape, or values that are not finite (the first such clips are listed).
    """
    given = np.asarray(features)
    if given.dtype.kind not in "fiu":
        raise FeatureError(f"{source} must be numbers, got the type {given.dtype}")
    x = np.ascontiguousarray(given, dtype=np.float32)
    if x.ndim == 2:
        x = x[:, None]
    if x.ndim != 3 or 0 in x.shape:
        raise FeatureError(f"{source} must be [clips, D] or [clips, views, D], got the shape {np.shape(features)}")
    bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2)))
    if len(bad):
        raise FeatureError(
            f"{source}: NaN or infinite values in {len(bad)} of {len(x)} clips, first {bad[:5].tolist()}"
        )
    return x


def evaluate(
    features: ArrayLike,
    episodes: Episodes,
    head: str | Head,
    *,
    workers: int | None = None,
    support_views: str = "each",
    device: str = "cpu",
    advance: Callable[[int], None] | None = None,
) -> EpisodeScores:
    """Classify the queries of every episode.

    With V views this is MM-CDFSL's ensemble inference over masks (arXiv 2405.19917, section 3.4): class probabilities
    are averaged over views and the largest is the answer.

    Args:
        features: float (clips, D) or (clips, V, D).
        episodes: indices into the clips.
        head: a name of `HEADS`, or a `Head`.
        workers: processes of the logistic head; the result does not depend on it.
        support_views: "each": view v of a query meets a classifier made from view v of the support. "first": one
            classifier from the first view, as in the paper's release.
        device: where the batched heads compute.
        advance: called with the number of episodes done, for a progress bar.

    Raises:
        FewshotError: features that are not finite, an unknown head, indices outside the features.
    """
    x = as_views(features)
    spec = find_head(head)
    if support_views not in SUPPORT_VIEWS:
        raise FewshotError(f"support_views={support_views!r} is not one of {', '.join(SUPPORT_VIEWS)}")
    highest = max(int(episodes.support.max()), int(episodes.query.max()))
    if highest >= len(x):
        raise FewshotError(f"the episodes name clip {highest}, but there are features of {len(x)} clips only")
    first, stopped = support_views == "first", 0
    if spec.kind == "logistic":
        predictions, stopped = predict_logistic(
            x, episodes, c=spec.c, first_support_view=first, normalise=spec.normalise, workers=workers, advance=advance
        )
    else:
        predictions = predict_batched(x, episodes, spec, first_support_view=first, device=device, advance=advance)
    accuracy = (predictions == episodes.targets).mean(axis=1)
    return EpisodeScores(episodes, predictions, accuracy, head if isinstance(head, str) else head.kind, stopped)


def merge_scores(parts: Sequence[EpisodeScores], whole: Episodes) -> EpisodeScores:
    """Scores of the shards of `whole`, put together in its order.

    Raises:
        FewshotError: an episode is missing or occurs twice.
    """
    numbers = np.concatenate([p.episodes.numbers for p in parts])
    order = np.argsort(numbers, kind="stable")
    if not np.array_equal(numbers[order], np.sort(whole.numbers)):
        raise FewshotError(
            f"the shards hold {len(numbers)} episodes, {len(np.unique(numbers))} distinct, of {len(whole)}"
        )
    back = order[np.argsort(np.argsort(whole.numbers))]
    return EpisodeScores(
        whole,
        np.concatenate([p.predictions for p in parts])[back],
        np.concatenate([p.accuracy for p in parts])[back],
        parts[0].head,
        sum(p.stopped for p in parts),
    )


def _mean_interval(values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Mean, standard deviation, standard error, half width of the 95 % interval (Student's t) of episode values."""
    if len(values) < 2:
        raise FewshotError(f"{len(values)} episode has no standard error; draw at least 2")
    std = float(values.std(ddof=1))
    error = std / float(np.sqrt(len(values)))
    return float(values.mean()), std, error, float(stats.t.ppf(0.975, len(values) - 1)) * error


def summarize(scores: EpisodeScores) -> dict[str, Any]:
    """The numbers of one row, as plain values.

    `top1_action_ensemble` is the mean accuracy (a fraction), `..._std` the standard deviation over episodes,
    `..._std_error` that of the mean, `ci95` the half width of its 95 % interval. The interval covers the choice of
    episodes from these clips; it says nothing about other clips or another training seed.
    """
    mean, std, error, ci95 = _mean_interval(scores.accuracy)
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
        "classifier": scores.head,
        "seed": episodes.seed,
        "disjoint": episodes.disjoint,
        "fits_not_converged": scores.stopped,
    }


def paired_difference(a: EpisodeScores, b: EpisodeScores) -> dict[str, float]:
    """Mean of accuracy(a) - accuracy(b) over the same episodes, with its 95 % interval.

    Far narrower than the difference of two intervals, because an easy episode is easy for both.

    Returns:
        difference, std_error, ci95 (half width), low, high: fractions.

    Raises:
        FewshotError: the episodes are not the same.
    """
    if not a.episodes.has_same_clips(b.episodes):
        raise FewshotError("a paired difference needs the same episodes of the same clips on both sides")
    mean, _, error, ci95 = _mean_interval(a.accuracy - b.accuracy)
    return {"difference": mean, "std_error": error, "ci95": ci95, "low": mean - ci95, "high": mean + ci95}


def confusion(scores: EpisodeScores, num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pooled confusion over all episodes.

    Returns:
        counts int64 (C, C): queries of class i (row) answered with class j (column); and met int64 (C, C): queries of
        class i in episodes where j could be answered. counts / met is comparable between classes, counts alone is not.
    """
    episodes = scores.episodes
    true = np.repeat(episodes.classes, episodes.q_sample, axis=1)  # (E, N * Q)
    answer = np.take_along_axis(episodes.classes, scores.predictions, axis=1)
    counts = np.zeros((num_classes, num_classes), dtype=np.int64)
    met = np.zeros_like(counts)
    np.add.at(counts, (true, answer), 1)
    np.add.at(met, (episodes.classes[:, :, None], episodes.classes[:, None, :]), episodes.q_sample)
    return counts, met


def per_class(scores: EpisodeScores, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Accuracy of each class over all of its queries, by name: {"accuracy": fraction, "queries": number}."""
    counts, _ = confusion(scores, len(names))
    queries = counts.sum(axis=1)
    return {
        names[c]: {"accuracy": float(counts[c, c] / queries[c]), "queries": int(queries[c])}
        for c in np.flatnonzero(queries).tolist()
    }
