"""Few-shot accuracy of the elements of labels, by part of the clips."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mmdistill.data.clips import ClipSource
from mmdistill.fewshot.episodes import EpisodeSpec, sample_episodes
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, run_protocol
from mmdistill.fewshot.report_card import EXACT_LABEL, clip_parts, element_values, part_accuracy
from mmdistill.fewshot.scores import EpisodeScores, mean_with_interval

PROTOCOL = Protocol(q_sample=6, episodes=60, classifiers=("centroid",), report_card=True)
LABELS = (
    "near_deuce_serve_-_-_T_-_in",
    "far_ad_return_bh_slice_CC_-_in",
    "near_middle_stroke_fh_gs_DL_approach_winner",
)


def make_clips(num: int = 600, *, seed: int = 0) -> Features:
    """Random strokes; the features are the one-hot technique for the near player and noise for the far player."""
    rng = np.random.default_rng(seed)
    sources = []
    for _ in range(num):
        player, court = rng.choice(["near", "far"]), rng.choice(["deuce", "middle", "ad"])
        side, technique = rng.choice(["fh", "bh"]), rng.choice(["gs", "slice", "volley", "lob", "drop"])
        if rng.uniform() < 0.2:
            label = f"{player}_{court}_serve_-_-_T_-_in"
        else:
            label = f"{player}_{court}_stroke_{side}_{technique}_CC_-_in"
        sources.append(ClipSource("m", label, f"{player} one", "LH" if player == "far" else "RH"))
    names = sorted({s.label for s in sources})
    techniques = sorted({s.label.split("_")[4] for s in sources})
    x = rng.normal(size=(num, 1, len(techniques)))
    for i, source in enumerate(sources):
        if source.label.startswith("near"):
            x[i] = 9 * np.eye(len(techniques))[techniques.index(source.label.split("_")[4])]
    labels = np.array([names.index(s.label) for s in sources])
    ids, groups = tuple(f"c{i}" for i in range(num)), tuple(f"v{i}" for i in range(num))
    info = {"network": "near technique"}
    return Features(x.astype(np.float32), labels, ids, groups, tuple(names), info, tuple(sources))


def test_elements_of_labels_are_the_eight_fields() -> None:
    """A serve has neither a side nor a technique; no approach is a class."""
    sources = [*(ClipSource("m", label) for label in LABELS), ClipSource("m")]
    values = element_values(sources)
    assert list(values) == ["player", "court", "type", "side", "technique", "direction", "approach", "outcome"]
    assert values["player"] == ["near", "far", "near", ""]
    assert values["side"] == ["", "bh", "fh", ""]
    assert values["technique"] == ["", "slice", "gs", ""]
    assert values["approach"] == ["-", "-", "approach", ""]
    assert values["outcome"] == ["in", "in", "winner", ""]


def test_parts_are_player_hand_serve_and_court_side() -> None:
    sources = [ClipSource("m", label, "A", hand) for label, hand in zip(LABELS, ("RH", "LH", ""), strict=True)]
    assert clip_parts(sources, element_values(sources)) == [
        ["near player", "far player", "near player"],
        ["hand RH", "hand LH", ""],
        ["serve", "no serve", "no serve"],
        ["court deuce", "court ad", "court middle"],
    ]
    others = [ClipSource("m", "near_left_net", "A", "RH")]  # of another sport
    assert list(element_values(others)) == ["field_0", "field_1", "field_2"]
    assert clip_parts(others, element_values(others)) == [["hand RH"]]


def test_clips_without_labels_and_labels_of_different_lengths_raise_an_error() -> None:
    with pytest.raises(FewshotError, match=r"no clip has a label; set data_module\.eval_clips=events"):
        element_values([ClipSource("m")])
    sources = [ClipSource("m", label) for label in (*LABELS, "near_ad_serve")]
    with pytest.raises(FewshotError, match=r"3 with 8 fields, 1 with 3 fields, for example 'near_ad_serve'"):
        element_values(sources)


def random_scores(seed: int) -> tuple[EpisodeScores, list[str]]:
    rng = np.random.default_rng(seed)
    episodes = sample_episodes(np.repeat(np.arange(4), 20), EpisodeSpec(3, 2, 7), episodes=30, seed=seed)
    predictions = rng.integers(0, 3, (30, 21))
    accuracy = (predictions == episodes.targets).mean(axis=1)
    return EpisodeScores(episodes, predictions, accuracy, "centroid"), rng.choice(["a", "b", ""], 80).tolist()


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_of_a_part_equals_a_loop_over_its_queries(seed: int) -> None:
    scores, parts = random_scores(seed)
    found = part_accuracy(scores, parts)
    assert set(found) == {"a", "b"}
    for part, row in found.items():
        counts = np.zeros((30, 2))
        for e in range(30):
            for position, clip in enumerate(scores.episodes.query[e].ravel().tolist()):
                if parts[clip] == part:
                    counts[e] += (scores.predictions[e, position] == position // 7, 1)
        correct, queries = counts.sum(axis=0)
        assert row["accuracy"] == pytest.approx(correct / queries)
        assert row["queries"] == queries
        covariance = np.cov(counts.T)
        ratio = correct / queries
        variance = covariance[0, 0] - 2 * ratio * covariance[0, 1] + ratio**2 * covariance[1, 1]
        error = np.sqrt(variance / 30) / counts[:, 1].mean()
        assert row["ci95"] == pytest.approx(stats.t.ppf(0.975, 29) * error)


def test_a_part_with_all_queries_has_the_mean_and_the_interval_over_episodes() -> None:
    scores, _ = random_scores(0)
    (row,) = part_accuracy(scores, ["all"] * 80).values()
    mean, _, _, ci95 = mean_with_interval(scores.accuracy)
    assert (row["accuracy"], row["ci95"]) == (pytest.approx(mean), pytest.approx(ci95))
    assert row["queries"] == 30 * 21


def test_the_card_finds_what_the_features_know() -> None:
    """The technique of the near player, which also tells a serve; all other elements are at chance."""
    clips = make_clips()
    results = run_protocol([clips], PROTOCOL, show_progress=False)
    card = results.report_card
    assert card is not None
    rows = {row.element: row for row in card.elements}
    assert list(rows) == [
        "player",
        "court",
        "type",
        "side",
        "technique",
        "direction",
        "approach",
        "outcome",
        EXACT_LABEL,
    ]
    ways = {name: row.scores[0].episodes.n_way for name, row in rows.items() if row.scores}
    assert ways == {"player": 2, "court": 3, "type": 2, "side": 2, "technique": 5, "direction": 2, EXACT_LABEL: 5}
    assert rows["approach"].not_scored == "not scored: 1 class (-)"
    assert rows["outcome"].not_scored == "not scored: 1 class (in)"
    assert rows["court"].scores[0].accuracy.mean() == pytest.approx(1 / 3, abs=0.05)
    technique = rows["technique"].parts[0]
    assert technique["near player"]["accuracy"] == technique["hand RH"]["accuracy"] > 0.6
    assert technique["far player"]["accuracy"] == technique["hand LH"]["accuracy"] < 0.4
    assert "serve" not in technique  # a serve has no technique
    serve = rows["type"].parts[0]
    assert serve["serve"]["queries"] == serve["no serve"]["queries"] == 60 * 6
    exact = rows[EXACT_LABEL]
    assert exact.scores[0] is results.headline.scores
    total = sum(exact.parts[0][f"court {c}"]["queries"] for c in ("deuce", "middle", "ad"))
    correct = sum(
        exact.parts[0][f"court {c}"]["queries"] * exact.parts[0][f"court {c}"]["accuracy"]
        for c in ("deuce", "middle", "ad")
    )
    assert total == 60 * 5 * 6
    assert correct / total == pytest.approx(results.headline.summary["top1_action_ensemble"])


def test_values_with_too_few_clips_are_excluded_or_not_scored() -> None:
    clips = make_clips()
    rare = tuple(
        replace(s, label=s.label.replace("_lob_", "_smash_")) if i < 30 else s for i, s in enumerate(clips.sources)
    )
    count = sum("_smash_" in s.label for s in rare)
    assert 0 < count < 7
    card = run_protocol([replace(clips, sources=rare)], PROTOCOL, show_progress=False).report_card
    assert card is not None
    technique = card.elements[4]
    assert technique.counts["smash"] == count
    assert set(technique.scores[0].episodes.eligibility.excluded.values()) == {count}
    few = tuple(
        replace(s, label=s.label.replace("_-_in", "_approach_in")) if i < 5 else s for i, s in enumerate(clips.sources)
    )
    card = run_protocol([replace(clips, sources=few)], PROTOCOL, show_progress=False).report_card
    assert card is not None
    assert card.elements[6].not_scored.startswith("not scored: 2-way 1-shot episodes with 6 queries need 2 classes")
    assert "approach (5)" in card.elements[6].not_scored
    assert card.to_json()["approach"] == {"clips": {"-": 595, "approach": 5}, "not_scored": card.elements[6].not_scored}


def test_elements_follow_the_disjoint_value_and_contain_each_network_once() -> None:
    clips = make_clips()
    other = replace(clips, info={"network": "other"})
    masked = replace(clips, info={**clips.info, "input_mode": "2 tube masks"})
    results = run_protocol([clips, masked, other], replace(PROTOCOL, disjoint="video"), show_progress=False)
    card = results.report_card
    assert card is not None
    assert card.networks == ("near technique", "other")
    assert {row.scores[0].episodes.eligibility.disjoint for row in card.elements if row.scores} == {"video"}
    networks = card.to_json()["technique"]["networks"]
    assert networks["near technique"]["top1_action_ensemble"] == networks["other"]["top1_action_ensemble"]
    assert networks["other"]["parts"]["near player"]["queries"] > 0
