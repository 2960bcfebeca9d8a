import numpy as np
import pytest

from mmdistill.fewshot.episodes import EpisodeSpec, sample_episodes
from mmdistill.fewshot.errors import EpisodeError, FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, run_protocol
from mmdistill.fewshot.scores import evaluate_episodes, paired_difference
from tests.synthetic_features import make_features


def test_every_combination_classifier_and_network_has_a_row():
    networks = [make_features("student_rgb", 1.0), make_features("teacher_rgb", 2.0), make_features("random", 9.0)]
    protocol = Protocol(n_way=(5, 3), k_shot=(1, 5), q_sample=5, episodes=30, classifiers=("centroid", "knn"))
    results = run_protocol(networks, protocol, show_progress=False)
    assert [(s.n_way, s.k_shot, s.classifier) for s in results.settings] == [
        (n, k, classifier) for n in (5, 3) for k in (1, 5) for classifier in ("centroid", "knn")
    ]
    for setting in results.settings:
        assert [row.network for row in setting.rows] == ["student_rgb", "teacher_rgb", "random"]
    headline = results.headline
    assert (headline.network, headline.summary["n_way"], headline.summary["k_shot"]) == ("student_rgb", 5, 1)
    assert headline.summary["checkpoint"] == "/runs/student_rgb.ckpt"
    scored, teacher, _ = results.settings[0].rows
    means = [r.summary["top1_action_ensemble"] for r in results.settings[0].rows]
    assert means[0] > means[1] > means[2]
    first = results.settings[0].difference_to_scored(teacher)
    assert first is not None
    assert first["low"] > 0
    assert first["difference"] == pytest.approx(means[0] - means[1])
    assert results.settings[0].difference_to_scored(scored) is None


def test_rows_equal_a_direct_evaluation():
    f = make_features("student_rgb", 2.0, views=2)
    row = run_protocol([f], Protocol(q_sample=5, episodes=20, seed=3), show_progress=False).headline
    episodes = sample_episodes(f.labels, EpisodeSpec(5, 1, 5), episodes=20, seed=3)
    direct = evaluate_episodes(f.features, episodes, "logistic", workers=1)
    assert np.array_equal(row.scores.predictions, direct.predictions)
    assert paired_difference(row.scores, direct)["difference"] == 0


def test_check_needs_labels_only_and_names_small_classes():
    f = make_features("student_rgb", 1.0)
    lines = Protocol(k_shot=(1, 5)).check(f.labels.tolist(), f.groups, f.classes)
    assert lines[0] == "5-way 1-shot, 15 queries per class: 8 eligible classes"
    assert len(lines) == 2
    with pytest.raises(EpisodeError, match=r"classes that have them: 0 of 8.*near_ad_stroke_fh_gs_CC \(30\)"):
        Protocol(k_shot=(16,)).check(f.labels.tolist(), f.groups, f.classes)


def test_check_finds_impossible_draws_and_probe_splits():
    """Each class can be split, but not all: with a and b, b and c, c and a, one of three videos is in both parts."""
    labels, groups, names = [0] * 6 + [1] * 6 + [2] * 6, list("aaabbbbbbccccccaaa"), ("x", "y", "z")
    settings = {"k_shot": (3,), "q_sample": 3, "disjoint": "video"}
    assert Protocol(n_way=(2,), **settings).check(labels, groups, names)
    with pytest.raises(EpisodeError, match="episode 0: no draw"):
        Protocol(n_way=(3,), **settings).check(labels, groups, names)
    with pytest.raises(
        FewshotError,
        match=r"needs at least 4 videos and a class with at least 4 clips; the data have 3 videos, .*probe=false",
    ):
        Protocol(n_way=(2,), q_sample=3, probe=True).check(labels, groups, names)


def test_probe_rows():
    networks = [make_features("student_rgb", 0.5), make_features("random", 30.0)]
    protocol = Protocol(q_sample=5, episodes=5, classifiers=("centroid",), probe=True)
    good, bad = run_protocol(networks, protocol, show_progress=False).probes
    assert good["linear_top1"] > 0.95
    assert good["knn_top1"] > 0.95
    assert bad["linear_top1"] < 0.35
    assert good["train_clips"] + good["test_clips"] == 240
    assert good["majority"] == pytest.approx(1 / 8, abs=0.06)


@pytest.mark.parametrize(
    "wrong", [{"k_shot": ()}, {"episodes": 1}, {"classifiers": ("svm",)}, {"n_way": (9,)}, {"disjoint": "rally"}]
)
def test_invalid_protocols_raise_an_error(wrong: dict[str, object]):
    with pytest.raises(FewshotError):
        run_protocol(
            [make_features("a", 1.0)], Protocol(**{"episodes": 5, "q_sample": 5, **wrong}), show_progress=False
        )


def test_networks_must_have_the_same_clips_and_different_names():
    a = make_features("a", 1.0)
    other = Features(a.features[1:], a.labels[1:], a.ids[1:], a.groups[1:], a.classes, {"network": "b"})
    for networks, message in (([a, other], "different clips"), ([a, a], "same name"), ([], "no features")):
        with pytest.raises(FewshotError, match=message):
            run_protocol(networks, Protocol(episodes=5, q_sample=5), show_progress=False)
