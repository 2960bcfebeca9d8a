import os

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from mmdistill.fewshot import logistic
from mmdistill.fewshot.classifiers import LogisticClassifier, PredictOptions
from mmdistill.fewshot.logistic import default_num_workers
from tests.contracts.classifier_contract import draw, noisy_features

ONE_WORKER = PredictOptions(workers=1)


def test_workers_do_not_change_predictions():
    features, episodes = noisy_features(noise=3.0), draw(60)  # more than one task per worker
    one, two = (LogisticClassifier().predict(features, episodes, PredictOptions(workers=n))[0] for n in (1, 2))
    assert np.array_equal(one, two)
    assert 0.25 < (one == episodes.targets).mean() < 0.95


def test_logistic_minimizes_the_documented_loss():
    """Independent implementation with C = 1: C * sum of cross-entropies + |W|^2 / 2, no penalty on the intercept."""
    features, episodes = noisy_features(views=1, width=6), draw(3)
    predictions, _ = LogisticClassifier().predict(features, episodes, ONE_WORKER)
    y = np.repeat(np.arange(5), 2)
    is_clear = []
    for e in range(3):
        x, query = (features[i[e].ravel(), 0].astype(float) for i in (episodes.support, episodes.query))

        def loss(flat: np.ndarray, x: np.ndarray = x) -> float:
            w, b = flat[:30].reshape(6, 5), flat[30:]
            z = x @ w + b
            return float((logsumexp(z, axis=1) - z[np.arange(10), y]).sum() + 0.5 * (w**2).sum())

        best = minimize(loss, np.zeros(35), method="BFGS", options={"gtol": 1e-6}).x
        logits = query @ best[:30].reshape(6, 5) + best[30:]
        ordered = np.sort(logits, axis=1)
        clear = ordered[:, -1] - ordered[:, -2] > 1e-2  # scikit-learn stops at a gradient of 1e-4
        assert np.array_equal(predictions[e][clear], logits.argmax(axis=1)[clear])
        is_clear.append(clear)
    assert np.mean(is_clear) > 0.9


def test_normalize_removes_the_length_of_the_features():
    features, episodes = noisy_features(), draw()
    lengths = np.random.default_rng(0).uniform(0.1, 10, size=(len(features), 2, 1)).astype(np.float32)
    classifier = LogisticClassifier(normalize=True)
    expected, _ = classifier.predict(features, episodes, ONE_WORKER)
    scaled, _ = classifier.predict(features * lengths, episodes, ONE_WORKER)
    assert np.array_equal(scaled, expected)


def test_fits_that_do_not_converge_are_counted(monkeypatch: pytest.MonkeyPatch):
    features, episodes = noisy_features(), draw(3)
    classifier = LogisticClassifier()
    assert classifier.predict(features, episodes, ONE_WORKER)[1] == 0
    monkeypatch.setattr(logistic, "MAX_ITERATIONS", 1)
    assert classifier.predict(features, episodes, ONE_WORKER)[1] == 3 * 2
    assert classifier.predict(features, episodes, PredictOptions(first_support_view=True, workers=1))[1] == 3


def test_default_num_workers_is_the_number_of_processors_but_at_most_16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)), raising=False)
    assert default_num_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert default_num_workers() == 16
