"""Logistic regression of scikit-learn in every episode.

This module does not import torch, because every worker process imports it. Each fit runs on one thread and reads only
its own episode, so the predictions do not depend on the number of workers.
"""

import warnings

import numpy as np
from numpy.typing import NDArray

from mmdistill.data.cores import available_cores
from mmdistill.fewshot.episodes import Episodes, FloatArray, IntArray

MAX_ITERATIONS = 1000


def default_num_workers() -> int:
    """Number of processors that this process may use, at most 16."""
    return min(16, available_cores())


def predict_logistic(
    features: FloatArray, episodes: Episodes, *, normalize: bool, first_support_view: bool
) -> tuple[IntArray, int]:
    """Predict the queries of the episodes of one task; arguments and result as in `classifiers`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    def views(clips: IntArray) -> NDArray[np.float64]:
        """(N, K) -> (V, N * K, D)."""
        x = features[clips.ravel()].astype(np.float64).swapaxes(0, 1)
        if normalize:
            x = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
        return np.ascontiguousarray(x)

    y = np.repeat(np.arange(episodes.n_way), episodes.k_shot)
    predictions, num_not_converged = [], 0
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller logs the total once
        for support, query in zip(map(views, episodes.support), map(views, episodes.query), strict=True):
            fitted = support[:1] if first_support_view else support
            models = [LogisticRegression(max_iter=MAX_ITERATIONS).fit(x, y) for x in fitted]
            num_not_converged += sum(int(max(model.n_iter_) >= MAX_ITERATIONS) for model in models)
            if first_support_view:
                models = models * len(query)
            probabilities = [model.predict_proba(x) for model, x in zip(models, query, strict=True)]
            predictions.append(np.mean(probabilities, axis=0).argmax(axis=1))
    return np.stack(predictions).astype(np.int64), num_not_converged
