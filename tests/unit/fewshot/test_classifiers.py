import re
import signal
from collections.abc import Iterable
from importlib.metadata import EntryPoint
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np
import pytest

from mmdistill import plugins
from mmdistill.fewshot import classifiers
from mmdistill.fewshot.classifiers import (
    CLASSIFIERS,
    CentroidClassifier,
    Classifier,
    KnnClassifier,
    LogisticClassifier,
    PredictOptions,
    get_classifier,
)
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.scores import evaluate_episodes
from tests.contracts.classifier_contract import LABELS, ClassifierContract, draw, noisy_features

BATCHED = [name for name in CLASSIFIERS.names() if not isinstance(get_classifier(name), LogisticClassifier)]


@pytest.mark.parametrize("name", CLASSIFIERS.names())
class TestBuiltinClassifiers(ClassifierContract):
    @pytest.fixture
    def classifier(self, name: str) -> Classifier:
        return get_classifier(name)


def predict_one_query(
    features: np.ndarray, support: np.ndarray, query: int, classifier: CentroidClassifier | KnnClassifier
) -> int:
    """The formula of the batched classifiers, written a second time for one query."""
    total = np.zeros(len(support))
    for view in range(features.shape[1]):
        s, q = features[support, view], features[query, view]  # (N, K, D), (D,)
        if classifier.center:
            mean = s.mean(axis=(0, 1))
            s, q = s - mean, q - mean
        if classifier.normalize:
            s, q = s / np.linalg.norm(s, axis=2, keepdims=True), q / np.linalg.norm(q)
        flat = s.reshape(-1, s.shape[2])
        unit = np.mean([((a - b) ** 2).sum() for i, a in enumerate(flat) for b in flat[:i]])
        if isinstance(classifier, CentroidClassifier):
            p = np.exp(10 * similarity(s.mean(axis=1), q, classifier.metric, unit))
            total += p / p.sum()
        else:
            score = similarity(flat, q, classifier.metric, unit)
            near = np.argsort(-score)[: support.shape[1]]
            share = np.exp(score / 0.07) / np.exp(score / 0.07).sum()
            total += np.bincount(near // support.shape[1], share[near], minlength=len(support))
    return int(total.argmax())


def similarity(rows: np.ndarray, q: np.ndarray, metric: str, unit: float) -> np.ndarray:
    if metric == "cosine":
        return rows @ q / np.linalg.norm(rows, axis=1) / np.linalg.norm(q)
    return -((rows - q) ** 2).sum(axis=1) / unit


@pytest.mark.parametrize("name", BATCHED)
def test_batched_classifiers_equal_a_loop_over_single_queries(name: str):
    features, episodes, classifier = noisy_features(), draw(8), get_classifier(name)
    assert isinstance(classifier, CentroidClassifier | KnnClassifier)
    predictions = evaluate_episodes(features, episodes, name).predictions
    wide = features.astype(np.float64)
    for e in range(len(episodes)):
        expected = [predict_one_query(wide, episodes.support[e], q, classifier) for q in episodes.query[e].ravel()]
        assert predictions[e].tolist() == expected


def load_documented_example() -> Classifier:
    """The classifier of docs/extending.md."""
    text = (Path(__file__).parents[3] / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(import numpy as np\n\nfrom mmdistill\.fewshot\.classifiers .*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, Classifier] = {}
    exec(code[1], names)
    return names["NEAREST_SHOT"]


DOCUMENTED = load_documented_example()


class TestDocumentedExample(ClassifierContract):
    @pytest.fixture
    def classifier(self) -> Classifier:
        return DOCUMENTED


def _add_entry_point(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    found = [EntryPoint("mine", value, "mmdistill.classifiers")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found if group == "mmdistill.classifiers" else [])
    monkeypatch.setattr(CLASSIFIERS, "_components", dict(CLASSIFIERS._components))


def test_an_entry_point_adds_a_classifier(monkeypatch: pytest.MonkeyPatch):
    _add_entry_point(monkeypatch, f"{__name__}:DOCUMENTED")
    assert CLASSIFIERS.names()[-1] == "mine"
    scores = evaluate_episodes(np.eye(8)[LABELS], draw(), "mine")
    assert scores.classifier == "mine"
    assert (scores.accuracy == 1).all()


def test_an_entry_point_must_name_a_classifier(monkeypatch: pytest.MonkeyPatch):
    _add_entry_point(monkeypatch, f"{__name__}:np")
    with pytest.raises(FewshotError, match=r"'mine': the entry point must name an instance of .*Classifier"):
        get_classifier("mine")


def test_unknown_and_old_names_raise_an_error_with_the_known_ones():
    with pytest.raises(FewshotError, match="classifier 'svm' is not one of logistic, logistic_l2"):
        get_classifier("svm")
    with pytest.raises(FewshotError, match=r"did you mean centroid_centered\?"):
        get_classifier("centroid_centred")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CentroidClassifier("manhattan"), "metric 'manhattan' is not one of cosine, euclidean"),
        (lambda: KnnClassifier("manhattan"), "metric 'manhattan' is not one of cosine, euclidean"),
    ],
)
def test_invalid_settings_raise_an_error(make, message: str):
    with pytest.raises(FewshotError, match=message):
        make()


def test_workers_start_with_sigint_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker inherits the mask. Ctrl-C during its imports would print a traceback."""
    masks: list[set[signal.Signals]] = []

    def parallel(tasks: Iterable[object]) -> list[object]:
        resource_tracker.ensure_running()  # loky calls it
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        return []

    monkeypatch.setattr(classifiers, "Parallel", lambda **_: parallel)
    with pytest.raises(ValueError, match="need at least one array"):  # no task has run
        LogisticClassifier().predict(noisy_features(), draw(), PredictOptions())
    assert signal.SIGINT in masks[0]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
