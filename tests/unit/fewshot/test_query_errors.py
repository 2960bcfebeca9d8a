"""Errors of an evaluation, compared with a search over all predictions in plain loops."""

from collections import Counter

import numpy as np
import pytest

from mmdistill.fewshot.episodes import EpisodeSpec, sample_episodes
from mmdistill.fewshot.query_errors import count_element_errors, find_query_errors, mark_differences
from mmdistill.fewshot.scores import EpisodeScores, evaluate_episodes
from mmdistill.fewshot.spotting_head import LabelElements

CLASSES = ("near_fh_CC", "near_bh_CC", "far_fh_CC", "far_bh_DL")
LABELS = np.repeat(np.arange(4), 8)


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(4, 6))[LABELS][:, None] + 1.5 * rng.normal(size=(32, 2, 6))).astype(np.float32)


@pytest.fixture(scope="module")
def scores(features: np.ndarray) -> EpisodeScores:
    episodes = sample_episodes(LABELS, EpisodeSpec(3, 2, 4), episodes=30, seed=0)
    return evaluate_episodes(features, episodes, "centroid")


def test_each_wrong_query_is_counted_with_its_most_frequent_class(features: np.ndarray, scores: EpisodeScores) -> None:
    wrong: dict[int, Counter[int]] = {}
    asked: Counter[int] = Counter()
    for e, classes in enumerate(scores.episodes.classes.tolist()):
        for n, clips in enumerate(scores.episodes.query[e].tolist()):
            for q, clip in enumerate(clips):
                asked[clip] += 1
                predicted = classes[int(scores.predictions[e, 4 * n + q])]
                if predicted != classes[n]:
                    wrong.setdefault(clip, Counter())[predicted] += 1
    errors = find_query_errors(features, scores)
    assert {error.clip: error.num_wrong for error in errors} == {clip: c.total() for clip, c in wrong.items()}
    for error in errors:
        assert error.true_class == LABELS[error.clip]
        assert error.num_queries == asked[error.clip]
        assert wrong[error.clip][error.predicted_class] == max(wrong[error.clip].values())
    assert [e.num_wrong for e in errors] == sorted((e.num_wrong for e in errors), reverse=True)
    assert 1 - sum(e.num_wrong for e in errors) / scores.predictions.size == pytest.approx(scores.accuracy.mean())


def test_neighbors_are_the_most_similar_support_clips_of_the_episode(
    features: np.ndarray, scores: EpisodeScores
) -> None:
    mean = features.mean(axis=1)
    for error in find_query_errors(features, scores):
        support = scores.episodes.support[error.episode].ravel().tolist()
        cosine = {
            c: mean[c] @ mean[error.clip] / np.linalg.norm(mean[c]) / np.linalg.norm(mean[error.clip]) for c in support
        }
        nearest = sorted(support, key=lambda clip: -cosine[clip])[:3]
        found = [neighbor.clip for neighbor in error.neighbors]
        assert found[:3] == nearest
        assert error.true_class in [neighbor.class_value for neighbor in error.neighbors]
        assert all(n.class_value == LABELS[n.clip] for n in error.neighbors)
        np.testing.assert_allclose([n.similarity for n in error.neighbors], [cosine[c] for c in found], rtol=1e-5)


def test_shares_of_elements_that_differ() -> None:
    """Two episodes with 3 classes and 1 query each: 0 as 1 (side), 2 as 3 (all but the player)."""
    episodes = sample_episodes(LABELS, EpisodeSpec(3, 1, 1), episodes=2, seed=0)
    classes = np.array([[0, 1, 2], [1, 2, 3]])
    object.__setattr__(episodes, "classes", classes)
    scores = EpisodeScores(episodes, np.array([[1, 1, 2], [0, 2, 2]]), np.array([2 / 3, 2 / 3]), "centroid")
    player, side, direction = count_element_errors(scores, CLASSES, LabelElements(("player", "side", "direction")))
    assert (player.share, side.share, direction.share) == (0, 1, 0.5)
    assert (player.expected, side.expected, direction.expected) == (0.5, 0.75, 0.25)


def test_a_perfect_evaluation_has_no_errors() -> None:
    episodes = sample_episodes(LABELS, EpisodeSpec(3, 1, 1), episodes=2, seed=0)
    scores = EpisodeScores(episodes, np.tile(episodes.targets, (2, 1)), np.ones(2), "centroid")
    assert find_query_errors(np.ones((32, 1, 2), np.float32), scores) == []
    assert count_element_errors(scores, CLASSES, LabelElements.of(CLASSES)) == []


def test_differing_elements_are_marked() -> None:
    assert mark_differences("near_fh_CC", "near_bh_CC") == [("near", False), ("fh", True), ("CC", False)]
    assert mark_differences("near_fh", "near_bh_CC") == [("near_fh", True)]
