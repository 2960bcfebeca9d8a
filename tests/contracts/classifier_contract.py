"""The contract of `mmdistill.fewshot.classifiers.Classifier`: subclass it and define the fixture `classifier`."""

import numpy as np
import pytest

from mmdistill.fewshot.classifiers import Classifier, PredictOptions
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, sample_episodes

LABELS = np.repeat(np.arange(8), 25)


def draw(episodes: int = 6, *, k_shot: int = 2) -> Episodes:
    """5-way episodes with 4 queries per class."""
    return sample_episodes(LABELS, EpisodeSpec(5, k_shot, 4), episodes=episodes, seed=1)


def noisy_features(*, views: int = 2, noise: float = 2.0, width: int = 16) -> np.ndarray:
    """float32 (200, views, width) around 8 class means."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(8, width))
    return (means[LABELS][:, None] + noise * rng.normal(size=(len(LABELS), views, width))).astype(np.float32)


class ClassifierContract:
    """Properties that every registered classifier must have."""

    @pytest.fixture
    def classifier(self) -> Classifier:
        raise NotImplementedError("return the classifier to test")

    def predict(
        self, classifier: Classifier, features: np.ndarray, episodes: Episodes, *, first_support_view: bool = False
    ) -> np.ndarray:
        options = PredictOptions(first_support_view, workers=1)
        predictions, num_not_converged = classifier.predict(features, episodes, options)
        assert num_not_converged >= 0
        return predictions

    @pytest.mark.parametrize("k_shot", [1, 5])
    def test_separable_classes_are_classified_correctly(self, classifier: Classifier, k_shot: int) -> None:
        episodes = draw(k_shot=k_shot)
        predictions = self.predict(classifier, np.eye(8, dtype=np.float32)[LABELS][:, None], episodes)
        assert predictions.shape == (6, 5 * 4)
        assert predictions.dtype == np.int64
        assert (predictions == episodes.targets).all()

    def test_predictions_are_deterministic(self, classifier: Classifier) -> None:
        features = noisy_features()
        first, second = (self.predict(classifier, features, draw()) for _ in range(2))
        assert np.array_equal(first, second)
        assert first.min() >= 0
        assert first.max() < 5

    def test_features_and_episodes_are_not_modified(self, classifier: Classifier) -> None:
        features, episodes = noisy_features(), draw()
        copies = features.copy(), episodes.support.copy(), episodes.query.copy()
        self.predict(classifier, features, episodes)
        for array, copy in zip((features, episodes.support, episodes.query), copies, strict=True):
            assert np.array_equal(array, copy)

    def test_an_episode_does_not_depend_on_the_other_episodes(self, classifier: Classifier) -> None:
        features, episodes = noisy_features(), draw()
        together = self.predict(classifier, features, episodes)
        for e in range(len(episodes)):
            assert np.array_equal(self.predict(classifier, features, episodes.take([e]))[0], together[e])

    def test_a_query_does_not_depend_on_the_other_queries(self, classifier: Classifier) -> None:
        features, episodes = noisy_features(), draw()
        predictions = self.predict(classifier, features, episodes).reshape(episodes.query.shape)
        changed = features.copy()
        for e in range(len(episodes)):
            changed[episodes.query[e, :, 1:].ravel()] = 100.0
            changed[episodes.support[e].ravel()] = features[episodes.support[e].ravel()]
            other = self.predict(classifier, changed, episodes.take([e])).reshape(episodes.query.shape[1:])
            assert np.array_equal(other[:, 0], predictions[e, :, 0])
            changed[:] = features

    def test_first_support_view_uses_only_the_first_view_of_the_support(self, classifier: Classifier) -> None:
        features, episodes = noisy_features(), draw(1)
        before = self.predict(classifier, features, episodes, first_support_view=True)
        features[episodes.support[0].ravel(), 1] = -100.0
        assert np.array_equal(self.predict(classifier, features, episodes, first_support_view=True), before)
        assert not np.array_equal(self.predict(classifier, features, episodes), before)

    def test_progress_counts_every_episode_once(self, classifier: Classifier) -> None:
        counts: list[int] = []
        classifier.predict(noisy_features(), draw(), PredictOptions(workers=1, advance=counts.append))
        assert sum(counts) == 6
