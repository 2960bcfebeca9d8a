import numpy as np
import pytest

from mmdistill.fewshot.classifiers import CLASSIFIERS
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, sample_episodes
from mmdistill.fewshot.scores import (
    count_confusions,
    evaluate_episodes,
    merge_scores,
    paired_difference,
    per_class_accuracy,
    summarize,
)

LABELS = np.repeat(np.arange(8), 25)


def draw(episodes: int = 60, *, k_shot: int = 2, seed: int = 1) -> Episodes:
    return sample_episodes(LABELS, EpisodeSpec(5, k_shot, 10), episodes=episodes, seed=seed)


def noisy(seed: int = 0, *, views: int = 2, noise: float = 1.0, width: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(8, width))
    return means[LABELS][:, None] + noise * rng.normal(size=(len(LABELS), views, width))


@pytest.mark.parametrize("classifier", CLASSIFIERS.names())
@pytest.mark.parametrize("k_shot", [1, 5])
def test_perfect_features_score_exactly_one(classifier: str, k_shot: int):
    scores = evaluate_episodes(np.eye(8)[LABELS], draw(10, k_shot=k_shot), classifier, workers=1)
    assert (scores.accuracy == 1.0).all()
    assert summarize(scores)["top1_action_ensemble"] == 1.0


@pytest.mark.parametrize("classifier", ["logistic", "centroid", "centroid_centered", "centroid_euclidean", "knn"])
def test_features_without_signal_score_chance(classifier: str):
    features = np.random.default_rng(5).normal(size=(len(LABELS), 12))
    row = summarize(evaluate_episodes(features, draw(100), classifier, workers=1))
    assert abs(row["top1_action_ensemble"] - 0.2) < 1.5 * row["ci95"]


def test_constant_features_score_chance_exactly():
    for classifier in CLASSIFIERS.names():
        assert (evaluate_episodes(np.ones((len(LABELS), 4)), draw(5), classifier, workers=1).accuracy == 0.2).all()


@pytest.mark.parametrize("classifier", [name for name in CLASSIFIERS.names() if name != "logistic"])
def test_the_scale_of_features_does_not_matter(classifier: str):
    features, episodes = noisy(noise=3.0), draw(10)
    big = evaluate_episodes(features * 1024, episodes, classifier, workers=1)
    assert np.array_equal(big.predictions, evaluate_episodes(features, episodes, classifier, workers=1).predictions)


def test_ensemble_averages_probabilities_and_beats_one_view():
    features, episodes = noisy(noise=3.0, views=6), draw(25)
    for classifier in ("logistic", "centroid_euclidean"):
        many = evaluate_episodes(features, episodes, classifier, workers=1)
        one = evaluate_episodes(features[:, :1], episodes, classifier, workers=1)
        assert paired_difference(many, one)["low"] > 0


def test_support_views_first_uses_one_classifier_for_all_query_views():
    features, episodes = noisy(noise=2.0), draw(20)
    copied = features.copy()
    copied[:, 1] = features[:, 0]
    for classifier in ("logistic", "centroid", "knn"):
        first = evaluate_episodes(copied, episodes, classifier, support_views="first", workers=1)
        each = evaluate_episodes(copied, episodes, classifier, support_views="each", workers=1)
        assert np.array_equal(first.predictions, each.predictions)  # both views are equal
        other = evaluate_episodes(features, episodes, classifier, support_views="first", workers=1)
        assert not np.array_equal(
            other.predictions, evaluate_episodes(features, episodes, classifier, workers=1).predictions
        )
    with pytest.raises(ValueError, match="support_views"):
        evaluate_episodes(features, episodes, "knn", support_views="all")


def test_invalid_features_raise_an_error():
    features = noisy()
    features[17, 1, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN.*1 of 200 clips.*\[17\]"):
        evaluate_episodes(features, draw(), "centroid")
    with pytest.raises(ValueError, match="features of only 100 clips"):
        evaluate_episodes(noisy()[:100], draw(), "centroid")
    with pytest.raises(ValueError, match="must be"):
        evaluate_episodes(np.zeros(7), draw(), "centroid")
    with pytest.raises(ValueError, match="logistic, logistic_l2"):
        evaluate_episodes(noisy(), draw(), "svm")


def test_summary_equals_the_written_out_formula():
    scores = evaluate_episodes(noisy(noise=3.0), draw(50), "centroid")
    row, a = summarize(scores), scores.accuracy
    assert row["top1_action_ensemble"] == pytest.approx(a.mean())
    std = np.sqrt(((a - a.mean()) ** 2).sum() / 49)
    assert row["top1_action_ensemble_std"] == pytest.approx(std)
    assert row["top1_action_ensemble_std_error"] == pytest.approx(std / np.sqrt(50))
    assert row["ci95"] == pytest.approx(2.0095752 * std / np.sqrt(50))  # t table, 49 degrees of freedom
    assert (row["episodes"], row["n_way"], row["k_shot"], row["q_sample"]) == (50, 5, 2, 10)
    with pytest.raises(ValueError, match="at least 2"):
        summarize(evaluate_episodes(noisy(), draw(1), "centroid"))


def test_the_interval_covers_the_true_mean_in_95_percent_of_draws():
    features = noisy(noise=3.0)
    truth = evaluate_episodes(features, draw(4000, seed=99), "centroid").accuracy.mean()
    rows = [summarize(evaluate_episodes(features, draw(40, seed=s), "centroid")) for s in range(100)]
    covered = sum(abs(r["top1_action_ensemble"] - truth) <= r["ci95"] for r in rows)
    assert 87 <= covered <= 100


def test_paired_differences_need_the_same_episodes():
    good, bad = (
        evaluate_episodes(noisy(noise=2.0), draw(), "centroid"),
        evaluate_episodes(noisy(noise=4.0), draw(), "centroid"),
    )
    pair = paired_difference(good, bad)
    assert pair["difference"] == pytest.approx(good.accuracy.mean() - bad.accuracy.mean())
    assert pair["low"] > 0
    assert paired_difference(good, good)["difference"] == 0
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(good, evaluate_episodes(noisy(), draw(seed=2), "centroid"))


def test_merged_scores_of_shards_equal_those_of_all_episodes():
    features, episodes = noisy(noise=3.0), draw(23)
    whole = evaluate_episodes(features, episodes, "logistic", workers=1)
    parts = [evaluate_episodes(features, episodes.shard(r, 3), "logistic", workers=1) for r in (2, 0, 1)]
    merged = merge_scores(parts, episodes)
    assert np.array_equal(merged.predictions, whole.predictions)
    assert np.array_equal(merged.accuracy, whole.accuracy)
    for wrong in (parts[:2], [*parts, parts[0]]):
        with pytest.raises(ValueError, match="of 23"):
            merge_scores(wrong, episodes)


def test_confusion_and_per_class_count_every_query_once():
    scores = evaluate_episodes(noisy(noise=3.0), draw(), "centroid")
    counts, possible = count_confusions(scores, 9)
    assert counts.sum() == 60 * 5 * 10
    assert np.trace(counts) / counts.sum() == pytest.approx(scores.accuracy.mean())
    assert (counts <= possible).all()
    assert np.array_equal(np.diag(possible), counts.sum(axis=1))
    table = per_class_accuracy(scores, [f"class {c}" for c in range(9)])
    assert "class 8" not in table
    mean = sum(v["accuracy"] * v["queries"] for v in table.values()) / 3000
    assert mean == pytest.approx(scores.accuracy.mean())
