"""The paper's classifier: scikit-learn's logistic regression, fitted anew in every episode, over several processes.

Nothing here imports torch, because every worker process imports this module. Each fit runs on one thread and sees
only its own episode, so the predictions do not depend on how many workers there are.

Shapes: E episodes, V views, N ways, K shots, Q queries per class, D width.
"""

import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmdistill.fewshot.episodes import Episodes

FloatArray = NDArray[np.float32]

_MAX_ITERATIONS = 1000
_EPISODES_PER_TASK = 25


def default_workers() -> int:
    """Processors this process may use, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def predict_logistic(
    features: FloatArray,
    episodes: Episodes,
    *,
    c: float,
    first_support_view: bool,
    normalise: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.int64], int]:
    """Predict the queries of every episode.

    ``LogisticRegression(C=c, max_iter=1000)``: multinomial, L2, lbfgs, features as they are (MM-CDFSL section 4.2 and
    its release; the other arguments are scikit-learn's defaults). Probabilities are averaged over the views.

    Args:
        features: float32 (clips, V, D).
        episodes: E episodes.
        c: inverse strength of the L2 penalty.
        first_support_view: fit one classifier on the support's first view and show it every view of the queries, as the
            paper's release does; otherwise one classifier per view.
        normalise: scale every feature to length 1 first.
        workers: processes; None = all processors, 1 = this process.
        advance: called with the number of episodes done.

    Returns:
        predictions int64 (E, N * Q), positions 0..N-1, and the number of fits that stopped before convergence.
    """
    from joblib import Parallel, delayed  # type: ignore[import-untyped]

    workers = default_workers() if workers is None else workers
    starts = range(0, len(episodes), _EPISODES_PER_TASK)
    blocks = [np.arange(s, min(s + _EPISODES_PER_TASK, len(episodes))) for s in starts]
    workers = max(1, min(workers, len(blocks)))
    jobs = (
        delayed(_predict_block)(features, episodes.support[b], episodes.query[b], c, first_support_view, normalise)
        for b in blocks
    )
    predictions, stopped = [], 0
    # loky workers are started anew, not forked: torch and DeepSpeed threads of this process do not follow them
    for done, bad in Parallel(n_jobs=workers, return_as="generator", inner_max_num_threads=1, backend="loky")(jobs):
        predictions.append(done)
        stopped += bad
        if advance is not None:
            advance(len(done))
    return np.concatenate(predictions), stopped


def _predict_block(
    features: FloatArray,
    support: NDArray[np.int64],
    query: NDArray[np.int64],
    c: float,
    first_support_view: bool,
    normalise: bool,
) -> tuple[NDArray[np.int64], int]:
    """Episodes of one task, on one thread. Support (e, N, K), query (e, N, Q) -> (e, N * Q), stopped fits."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    out, stopped = [], 0
    with threadpool_limits(limits=1):
        for s, q in zip(support, query, strict=True):
            fit_x = _views(features, s, normalise)  # (V, N * K, D)
            ask_x = _views(features, q, normalise)  # (V, N * Q, D)
            y = np.repeat(np.arange(len(s)), s.shape[1])
            probabilities, bad = _one_episode(fit_x, y, ask_x, c, first_support_view)
            out.append(probabilities.argmax(axis=1))
            stopped += bad
    return np.stack(out).astype(np.int64), stopped


def _views(features: FloatArray, index: NDArray[np.int64], normalise: bool) -> NDArray[np.float64]:
    x = features[index.reshape(-1)].astype(np.float64).swapaxes(0, 1)
    if normalise:
        x = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
    return np.ascontiguousarray(x)


def _one_episode(
    fit_x: NDArray[np.float64],
    y: NDArray[np.int64],
    ask_x: NDArray[np.float64],
    c: float,
    first_support_view: bool,
) -> tuple[NDArray[np.float64], int]:
    """Mean class probabilities (N * Q, N) over the views, and the number of fits that did not converge."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    probabilities, stopped = [], 0
    classifier = None
    for view, x in enumerate(ask_x):
        if classifier is None or not first_support_view:
            with warnings.catch_warnings():  # counted below and reported once, not printed 1,200 times
                warnings.simplefilter("ignore", ConvergenceWarning)
                classifier = LogisticRegression(C=c, max_iter=_MAX_ITERATIONS).fit(fit_x[view], y)
            stopped += int(max(classifier.n_iter_) >= _MAX_ITERATIONS)
        probabilities.append(classifier.predict_proba(x))
    return np.mean(probabilities, axis=0), stopped
