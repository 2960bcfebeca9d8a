"""Draws, metrics and files of few-shot event spotting."""

import json
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.annotations import load_annotations
from mmdistill.data.annotations.base import Event, Rally
from mmdistill.evaluation.spotting import (
    SpottingProtocol,
    evaluate_spotting,
    predictions_json,
    print_results,
    results_json,
    select_labeled,
)
from mmdistill.fewshot.errors import FewshotError

LABELS = ("near_ad_serve_-_-_T_-_in", "far_ad_stroke_fh_gs_CC_-_in")


def make_rallies(count: int = 5) -> list[Rally]:
    return [
        Rally(f"r{i}", 30, 25.0, tuple(Event(frame + i, LABELS[(frame + i) % 2]) for frame in (3, 12, 20)))
        for i in range(count)
    ]


def one_hot(rallies: list[Rally]) -> dict[str, np.ndarray]:
    found = {}
    for rally in rallies:
        x = np.zeros((30, 3), np.float32)
        x[:, 2] = 1
        for event in rally.events:
            x[event.frame] = np.eye(3)[LABELS.index(event.label)]
        found[rally.video] = x
    return found


@pytest.fixture(scope="module")
def results():
    rallies = make_rallies()
    constant = {rally.video: np.ones((30, 3), np.float32) for rally in rallies}
    return evaluate_spotting(
        {"student_rgb": one_hot(rallies), "random": constant}, rallies, SpottingProtocol(shots=3, draws=2)
    )


def test_one_hot_features_score_100_in_every_metric(results):
    values = results.metrics["student_rgb"]
    assert {"f1_strict@0/label", "f1_published@4/court", "f1_strict@1/elements", "edit", "map@0"} <= set(values)
    assert all(value == [100, 100] for value in values.values())


def test_constant_features_are_worse_and_the_difference_is_paired(results):
    row = results.summary()["random"]["map@0"]
    values = np.array(results.metrics["student_rgb"]["map@0"]) - results.metrics["random"]["map@0"]
    assert row["difference"] == pytest.approx(values.mean())
    assert row["difference"] > 0
    assert row["difference_ci95"] == pytest.approx(12.706205 * values.std(ddof=1) / np.sqrt(2))


def test_predictions_are_annotations_of_the_other_rallies(results, tmp_path: Path):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(predictions_json(results)))
    found = load_annotations(path)
    assert {rally.video for rally in found} == {r.video for r in make_rallies()} - set(results.labeled[0])
    assert all(rally in make_rallies() for rally in found)
    assert all(0.5 <= event["score"] <= 1 for rally in json.loads(path.read_text()) for event in rally["events"])


def test_results_are_plain_values_and_printed_by_network(results, capsys: pytest.CaptureFixture[str]):
    assert json.loads(json.dumps(results_json(results)))["labeled"] == [list(videos) for videos in results.labeled]
    print_results(results)
    out = capsys.readouterr().out
    assert "3 labeled rallies, 2 draws" in out
    assert "Δ random" in out
    assert "100.0 ± 0.0" in out


def test_draws_depend_on_the_seed_only_and_not_on_the_order_of_the_file():
    videos = [rally.video for rally in make_rallies(9)]
    first = SpottingProtocol(shots=3, draws=4, seed=1).labeled_rallies(videos)
    assert first == SpottingProtocol(shots=3, draws=4, seed=1).labeled_rallies(videos[::-1])
    assert first != SpottingProtocol(shots=3, draws=4, seed=2).labeled_rallies(videos)
    assert len(set(first)) == 4
    assert first[:2] == SpottingProtocol(shots=3, draws=2, seed=1).labeled_rallies(videos)


def test_named_rallies_give_one_draw():
    assert SpottingProtocol(named=("b", "a")).labeled_rallies(["a", "b", "c"]) == [("b", "a")]
    with pytest.raises(FewshotError, match=r"no labeled rally aa .*did you mean a"):
        SpottingProtocol(named=("aa",)).labeled_rallies(["a", "b"])


@pytest.mark.parametrize("shots", [0, 3])
def test_a_draw_without_labeled_or_other_rallies_is_rejected(shots: int):
    with pytest.raises(FewshotError, match="select between 1 and 2"):
        SpottingProtocol(shots=shots).labeled_rallies(["a", "b", "c"])


def test_rallies_without_labels_are_not_used_and_partly_labeled_ones_are_rejected():
    labeled, unlabeled = make_rallies(1)[0], Rally("u", 30, 25.0, (Event(3, ""),))
    (found,) = select_labeled([labeled, unlabeled], ["type", "direction"])
    assert (found.video, {event.label for event in found.events}) == ("r0", {"serve_T", "stroke_CC"})
    with pytest.raises(FewshotError, match="no rally has labeled events"):
        select_labeled([unlabeled], None)
    with pytest.raises(FewshotError, match="p: the event at frame 5 has no label"):
        select_labeled([Rally("p", 30, 25.0, (Event(3, "a"), Event(5, "")))], None)
