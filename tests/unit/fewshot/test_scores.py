import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from mmdistill.fewshot.classifiers import HEADS, Head
from mmdistill.fewshot.episodes import Episodes, sample_episodes
from mmdistill.fewshot.scores import (
    confusion,
    evaluate,
    merge_scores,
    paired_difference,
    per_class,
    summarize,
)

LABELS = np.repeat(np.arange(8), 25)


def draw(episodes: int = 60, **options: object) -> Episodes:
    protocol = {"n_way": 5, "k_shot": 2, "q_sample": 10, "episodes": episodes, "seed": 1}
    return sample_episodes(LABELS, **{**protocol, **options})


def noisy(seed: int = 0, *, views: int = 2, noise: float = 1.0, width: int = 16) -> np.ndarray:
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(8, width))
    return means[LABELS][:, None] + noise * rng.normal(size=(len(LABELS), views, width))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("k_shot", [1, 5])
def test_perfect_features_score_exactly_one(head: str, k_shot: int):
    scores = evaluate(np.eye(8)[LABELS], draw(10, k_shot=k_shot), head, workers=1)
    assert (scores.accuracy == 1.0).all()
    assert summarize(scores)["top1_action_ensemble"] == 1.0


@pytest.mark.parametrize("head", ["logistic", "centroid", "centroid_centered", "centroid_euclidean", "knn"])
def test_features_without_signal_score_chance(head: str):
    features = np.random.default_rng(5).normal(size=(len(LABELS), 12))
    row = summarize(evaluate(features, draw(100), head, workers=1))
    assert abs(row["top1_action_ensemble"] - 0.2) < 1.5 * row["ci95"]


def test_constant_features_score_chance_exactly():
    for head in HEADS:
        assert (evaluate(np.ones((len(LABELS), 4)), draw(5), head, workers=1).accuracy == 0.2).all()


def test_workers_do_not_change_predictions():
    features = noisy(noise=3.0)
    one = evaluate(features, draw(), "logistic", workers=1)
    two = evaluate(features, draw(), "logistic", workers=2)
    assert np.array_equal(one.predictions, two.predictions)
    assert 0.25 < one.accuracy.mean() < 0.95


def test_logistic_minimises_the_stated_loss():
    """Independent statement: C * sum of cross-entropies + |W|^2 / 2, no penalty on the intercept."""
    features, episodes = noisy(noise=2.0, views=1, width=6).astype(np.float32).astype(float), draw(3)
    scores = evaluate(features, episodes, "logistic", workers=1)
    y = np.repeat(np.arange(5), 2)
    for e in range(3):
        x, ask = features[episodes.support[e].ravel(), 0], features[episodes.query[e].ravel(), 0]

        def loss(flat: np.ndarray, x: np.ndarray = x) -> float:
            w, b = flat[:30].reshape(6, 5), flat[30:]
            z = x @ w + b
            return float((logsumexp(z, axis=1) - z[np.arange(10), y]).sum() + 0.5 * (w**2).sum())

        best = minimize(loss, np.zeros(35), method="BFGS", options={"gtol": 1e-6}).x
        logits = ask @ best[:30].reshape(6, 5) + best[30:]
        ordered = np.sort(logits, axis=1)
        clear = ordered[:, -1] - ordered[:, -2] > 1e-2  # scikit-learn stops at a gradient of 1e-4
        assert np.array_equal(scores.predictions[e][clear], logits.argmax(axis=1)[clear])
        assert clear.mean() > 0.9


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.kind != "logistic"])
def test_batched_heads_equal_a_loop_over_single_queries(name: str):
    features, episodes, head = noisy(noise=2.0), draw(8), HEADS[name]
    got = evaluate(features, episodes, name).predictions
    for e in range(len(episodes)):
        expected = [one_query(features, episodes.support[e], q, head) for q in episodes.query[e].ravel()]
        assert got[e].tolist() == expected


def one_query(features: np.ndarray, support: np.ndarray, query: int, head: Head) -> int:
    total = np.zeros(len(support))
    for view in range(features.shape[1]):
        s, q = features[support, view], features[query, view]  # (N, K, D), (D,)
        if head.centre:
            mean = s.mean(axis=(0, 1))
            s, q = s - mean, q - mean
        if head.normalise:
            s, q = s / np.linalg.norm(s, axis=2, keepdims=True), q / np.linalg.norm(q)
        flat = s.reshape(-1, s.shape[2])
        unit = np.mean([((a - b) ** 2).sum() for i, a in enumerate(flat) for b in flat[:i]])
        if head.kind == "centroid":
            p = np.exp(10 * similarity(s.mean(axis=1), q, head.metric, unit))
        else:
            score = similarity(flat, q, head.metric, unit)
            near = np.argsort(-score)[: support.shape[1]]
            share = np.exp(score / 0.07) / np.exp(score / 0.07).sum()
            p = np.bincount(near // support.shape[1], share[near], minlength=len(support))
        total += p / p.sum() if head.kind == "centroid" else p
    return int(total.argmax())


def similarity(rows: np.ndarray, q: np.ndarray, metric: str, unit: float) -> np.ndarray:
    if metric == "cosine":
        return rows @ q / np.linalg.norm(rows, axis=1) / np.linalg.norm(q)
    return -((rows - q) ** 2).sum(axis=1) / unit


@pytest.mark.parametrize("head", [name for name in HEADS if name != "logistic"])
def test_the_scale_of_features_does_not_matter(head: str):
    features, episodes = noisy(noise=3.0), draw(10)
    big = evaluate(features * 1024, episodes, head, workers=1)
    assert np.array_equal(big.predictions, evaluate(features, episodes, head, workers=1).predictions)


def test_ensemble_averages_probabilities_and_beats_one_view():
    features, episodes = noisy(noise=3.0, views=6), draw(25)
    for head in ("logistic", "centroid_euclidean"):
        many = evaluate(features, episodes, head, workers=1)
        one = evaluate(features[:, :1], episodes, head, workers=1)
        assert paired_difference(many, one)["low"] > 0


def test_support_views_first_uses_one_classifier_for_all_query_views():
    features, episodes = noisy(noise=2.0), draw(20)
    copied = features.copy()
    copied[:, 1] = features[:, 0]
    for head in ("logistic", "centroid", "knn"):
        first = evaluate(copied, episodes, head, support_views="first", workers=1)
        each = evaluate(copied, episodes, head, support_views="each", workers=1)
        assert np.array_equal(first.predictions, each.predictions)  # equal views: nothing to choose
        other = evaluate(features, episodes, head, support_views="first", workers=1)
        assert not np.array_equal(other.predictions, evaluate(features, episodes, head, workers=1).predictions)
    with pytest.raises(ValueError, match="support_views"):
        evaluate(features, episodes, "knn", support_views="all")


def test_features_are_checked():
    features = noisy()
    features[17, 1, 3] = np.nan
    with pytest.raises(ValueError, match=r"NaN.*1 of 200 clips.*\[17\]"):
        evaluate(features, draw(), "centroid")
    with pytest.raises(ValueError, match="features of 100 clips only"):
        evaluate(noisy()[:100], draw(), "centroid")
    with pytest.raises(ValueError, match="must be"):
        evaluate(np.zeros(7), draw(), "centroid")
    with pytest.raises(ValueError, match="logistic, logistic_l2"):
        evaluate(noisy(), draw(), "svm")


def test_summary_is_the_written_out_formula():
    scores = evaluate(noisy(noise=3.0), draw(50), "centroid")
    row, a = summarize(scores), scores.accuracy
    assert row["top1_action_ensemble"] == pytest.approx(a.mean())
    std = np.sqrt(((a - a.mean()) ** 2).sum() / 49)
    assert row["top1_action_ensemble_std"] == pytest.approx(std)
    assert row["top1_action_ensemble_std_error"] == pytest.approx(std / np.sqrt(50))
    assert row["ci95"] == pytest.approx(2.0095752 * std / np.sqrt(50))  # t table, 49 degrees of freedom
    assert (row["episodes"], row["n_way"], row["k_shot"], row["q_sample"]) == (50, 5, 2, 10)
    with pytest.raises(ValueError, match="at least 2"):
        summarize(evaluate(noisy(), draw(1), "centroid"))


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    features = noisy(noise=3.0)
    truth = evaluate(features, draw(4000, seed=99), "centroid").accuracy.mean()
    rows = [summarize(evaluate(features, draw(40, seed=s), "centroid")) for s in range(100)]
    covered = sum(abs(r["top1_action_ensemble"] - truth) <= r["ci95"] for r in rows)
    assert 87 <= covered <= 100


def test_paired_differences_need_the_same_episodes():
    good, bad = evaluate(noisy(noise=2.0), draw(), "centroid"), evaluate(noisy(noise=4.0), draw(), "centroid")
    pair = paired_difference(good, bad)
    assert pair["difference"] == pytest.approx(good.accuracy.mean() - bad.accuracy.mean())
    assert pair["low"] > 0
    assert paired_difference(good, good)["difference"] == 0
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(good, evaluate(noisy(), draw(seed=2), "centroid"))


def test_scores_of_shards_merge_to_the_whole():
    features, episodes = noisy(noise=3.0), draw(23)
    whole = evaluate(features, episodes, "logistic", workers=1)
    parts = [evaluate(features, episodes.shard(r, 3), "logistic", workers=1) for r in (2, 0, 1)]
    merged = merge_scores(parts, episodes)
    assert np.array_equal(merged.predictions, whole.predictions)
    assert np.array_equal(merged.accuracy, whole.accuracy)
    for wrong in (parts[:2], [*parts, parts[0]]):
        with pytest.raises(ValueError, match="of 23"):
            merge_scores(wrong, episodes)


def test_confusion_and_per_class_count_every_query_once():
    scores = evaluate(noisy(noise=3.0), draw(), "centroid")
    counts, met = confusion(scores, 9)
    assert counts.sum() == 60 * 5 * 10
    assert np.trace(counts) / counts.sum() == pytest.approx(scores.accuracy.mean())
    assert (counts <= met).all()
    assert np.array_equal(np.diag(met), counts.sum(axis=1))
    table = per_class(scores, [f"class {c}" for c in range(9)])
    assert "class 8" not in table
    mean = sum(v["accuracy"] * v["queries"] for v in table.values()) / 3000
    assert mean == pytest.approx(scores.accuracy.mean())
