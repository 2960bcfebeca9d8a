"""The curve of the accuracy against the number of labels."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.evaluation import rally_selection
from mmdistill.evaluation.rally_selection import RULES, label_curve, plot_curve, print_curve
from mmdistill.fewshot.errors import FewshotError

LABELS = [f"near_ad_serve_-_-_{name}_-_in" for name in "ABCD"]


def make_groups(*, common: int, rare: int) -> tuple[list[Rally], dict[str, np.ndarray]]:
    """Rallies of a group have the same label, and frames of an event show the group."""
    groups = [0] * common + [i for i in (1, 2, 3) for _ in range(rare)]
    rallies = [Rally(f"r{i:02d}", 20, 25.0, (Event(5, LABELS[g]), Event(14, LABELS[g]))) for i, g in enumerate(groups)]
    features = {}
    for rally, group in zip(rallies, groups, strict=True):
        x = np.zeros((20, 9), np.float32)
        x[:, group] = 1
        x[[5, 14], 4 + group] = 1
        x[[5, 14], 8] = 1
        features[rally.video] = x
    return rallies, features


def test_k_center_is_better_than_random_where_most_rallies_look_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rally_selection, "SpottingHead", partial(rally_selection.SpottingHead, steps=30))
    rallies, features = make_groups(common=11, rare=3)
    curve = label_curve(features, rallies, draws=2, seed=0)
    rows = {int(row["rallies"]): row for row in curve.rows()}
    assert list(rows) == [1, 2, 4, 8, 10]
    assert curve.held_out == 10
    assert rows[1]["difference"] == 0, "both rules start with the same rally"
    assert rows[4]["difference"] > 0
    assert rows[4]["labels_random"] == rows[4]["labels_k-center"] == 8
    assert rows[10]["k-center"] == pytest.approx(rows[10]["random"], abs=5), "the same rallies in another order"
    assert curve.to_json()["rows"] == curve.rows()
    print_curve(curve)
    assert "label F1 strict, 10 evaluated rallies, 2 draws" in capsys.readouterr().out
    plot_curve(curve.rows(), tmp_path / "curve.png")
    image = cv2.cvtColor(cv2.imread(str(tmp_path / "curve.png")), cv2.COLOR_BGR2RGB)
    for color in RULES.values():
        assert (image == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(axis=2).sum() > 100


@pytest.mark.parametrize(("count", "draws"), [(3, 2), (8, 1)])
def test_too_few_rallies_or_draws_are_rejected(count: int, draws: int):
    rallies, features = make_groups(common=count, rare=0)
    with pytest.raises(FewshotError, match=rf"at least 4 labeled rallies and 2 draws; found {count} and {draws}"):
        label_curve(features, rallies, draws=draws, seed=0)
