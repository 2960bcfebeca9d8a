"""Logistic regression in every episode, with scikit-learn and several processes.

This module does not import torch, because every worker process imports it. Each fit runs on one thread and reads only
its own episode, so the predictions do not depend on the number of workers.

Shapes: E episodes (e: of one task), V views, N ways, K shots, Q queries per class, D width.
"""

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmdistill.fewshot.episodes import Episodes

FloatArray = NDArray[np.float32]

_MAX_ITERATIONS = 1000
_EPISODES_PER_TASK = 25


def default_num_workers() -> int:
    """Number of processors that this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def predict_logistic(
    features: FloatArray,
    episodes: Episodes,
    *,
    c: float,
    first_support_view: bool,
    normalize: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.int64], int]:
    """Predict the queries of every episode.

    ``LogisticRegression(C=c, max_iter=1000)``: multinomial, L2, lbfgs, features without scaling (MM-CDFSL section 4.2
    and its release; the other arguments are scikit-learn's defaults). Probabilities are averaged over the views.

    Args:
        features: float32 (clips, V, D).
        episodes: E episodes.
        c: inverse strength of the L2 penalty.
        first_support_view: fit one classifier on the first view of the support clips and apply it to every view of the
            queries, as the paper's release does. Otherwise fit one classifier per view.
        normalize: scale every feature to length 1 first.
        workers: number of processes; None: all processors; 1: this process.
        advance: called with the number of episodes that have been finished since the last call.

    Returns:
        predictions int64 (E, N * Q), positions 0..N-1, and the number of fits that did not converge.
    """
    from joblib import Parallel, delayed  # type: ignore[import-untyped]

    workers = default_num_workers() if workers is None else workers
    starts = range(0, len(episodes), _EPISODES_PER_TASK)
    tasks = [np.arange(s, min(s + _EPISODES_PER_TASK, len(episodes))) for s in starts]
    workers = max(1, min(workers, len(tasks)))
    calls = (
        delayed(_predict_task)(features, episodes.support[t], episodes.query[t], c, first_support_view, normalize)
        for t in tasks
    )
    predictions, num_not_converged = [], 0
    # loky starts new interpreters. A fork would inherit the locks of the torch and DeepSpeed threads of this process.
    parallel = Parallel(n_jobs=workers, return_as="generator", inner_max_num_threads=1, backend="loky")
    for predicted, count in parallel(calls):
        predictions.append(predicted)
        num_not_converged += count
        if advance is not None:
            advance(len(predicted))
    return np.concatenate(predictions), num_not_converged


def _predict_task(
    features: FloatArray,
    support: NDArray[np.int64],
    query: NDArray[np.int64],
    c: float,
    first_support_view: bool,
    normalize: bool,
) -> tuple[NDArray[np.int64], int]:
    """Episodes of one task, on one thread. (e, N, K), (e, N, Q) -> (e, N * Q), number of fits without convergence."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    predictions, num_not_converged = [], 0
    with threadpool_limits(limits=1):
        for s, q in zip(support, query, strict=True):
            support_x = _gather_views(features, s, normalize)  # (V, N * K, D)
            query_x = _gather_views(features, q, normalize)  # (V, N * Q, D)
            y = np.repeat(np.arange(len(s)), s.shape[1])
            probabilities, count = _predict_episode(support_x, y, query_x, c, first_support_view)
            predictions.append(probabilities.argmax(axis=1))
            num_not_converged += count
    return np.stack(predictions).astype(np.int64), num_not_converged


def _gather_views(features: FloatArray, index: NDArray[np.int64], normalize: bool) -> NDArray[np.float64]:
    """(clips, V, D), (N, K) -> (V, N * K, D)."""
    x = features[index.reshape(-1)].astype(np.float64).swapaxes(0, 1)
    if normalize:
        x = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
    return np.ascontiguousarray(x)


def _predict_episode(
    support_x: NDArray[np.float64],
    y: NDArray[np.int64],
    query_x: NDArray[np.float64],
    c: float,
    first_support_view: bool,
) -> tuple[NDArray[np.float64], int]:
    """Mean class probabilities (N * Q, N) over the views, and the number of fits that did not converge."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probabilities, num_not_converged = [], 0
    model = None
    for view, x in enumerate(query_x):
        if model is None or not first_support_view:
            with warnings.catch_warnings():  # the caller logs the total once instead of one warning per fit
                warnings.simplefilter("ignore", ConvergenceWarning)
                model = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS).fit(support_x[view], y)
            num_not_converged += int(max(model.n_iter_) >= _MAX_ITERATIONS)
        probabilities.append(model.predict_proba(x))
    return np.mean(probabilities, axis=0), num_not_converged
