"""The k-center selection of rallies."""

import numpy as np
import pytest

from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.rally_selection import select_rallies


def make_features(centers: dict[str, float], *, frames: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        video: np.array([center, 0.0]) + rng.normal(0, 0.01, (frames + i, 2))
        for i, (video, center) in enumerate(centers.items())
    }


def written_out(features: dict[str, np.ndarray], selected: list[str]) -> str:
    """The next rally, from all distances in plain loops."""
    frames = np.concatenate([features[v] for v in sorted(features)])
    scaled = {v: (x - frames.mean(0)) / frames.std(0) for v, x in features.items()}
    scores = {}
    for video in set(features) - set(selected):
        nearest = [min(np.linalg.norm(a - b) for v in selected for b in scaled[v]) for a in scaled[video]]
        scores[video] = np.mean(nearest)
    return max(scores, key=scores.__getitem__)


def test_each_step_selects_the_farthest_rally():
    rng = np.random.default_rng(1)
    features = {f"r{i}": rng.normal(rng.normal(0, 2, 3), 1, (rng.integers(4, 9), 3)) for i in range(9)}
    selected = select_rallies(features, 6)
    for i in range(1, 6):
        assert selected[i] == written_out(features, selected[:i])


def test_selection_covers_all_groups_before_it_repeats_one():
    features = make_features({"a1": 0, "a2": 0.1, "a3": 0.2, "b1": 10, "b2": 10.1, "c1": -10})
    assert {video[0] for video in select_rallies(features, 3)} == {"a", "b", "c"}


def test_labeled_rallies_count_as_selected_and_are_never_selected():
    features = make_features({"a1": 0, "a2": 0.1, "b1": 10, "b2": 10.1, "c1": -10})
    selected = select_rallies(features, 3, labeled=["b1", "c1"])
    assert selected[0][0] == "a"
    assert sorted(selected) == ["a1", "a2", "b2"]


def test_one_unusual_frame_has_little_influence():
    features = make_features({"a1": 0, "a2": 0.1, "b": 10}, frames=50)
    features["a2"][0] = 30
    assert select_rallies(features, 2, first="a1") == ["a1", "b"]


def test_the_first_rally_is_the_central_one():
    assert select_rallies(make_features({"x": -5, "m": 0, "y": 5}), 1) == ["m"]


@pytest.mark.parametrize("budget", [0, 3])
def test_impossible_budgets_are_rejected_with_the_count(budget: int):
    features = make_features({"a": 0, "b": 1, "c": 2})
    with pytest.raises(FewshotError, match=rf"budget={budget} of 2 rallies without labels; select between 1 and 2"):
        select_rallies(features, budget, labeled=["c"])
