"""The temporal head on features whose events are known."""

import numpy as np
import pytest

from mmdistill.data.annotations.base import Event
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.spotting_head import LabelElements, SpottingHead, confident

TENNIS = "near_deuce_serve_-_-_T_-_in"
LABELS = ("near_ad_serve_-_-_T_-_in", "far_ad_stroke_fh_gs_CC_-_in", "near_deuce_stroke_bh_slice_DL_-_winner")


def rallies(count, *, seed=0):
    """One-hot features (T, D) of the label at each event frame, and the events."""
    rng = np.random.default_rng(seed)
    features, events = {}, {}
    for i in range(count):
        length = int(rng.integers(40, 60))
        frames = range(int(rng.integers(2, 8)), length, 9)
        events[f"r{i}"] = [Event(frame, str(rng.choice(LABELS))) for frame in frames]
        x = np.zeros((length, len(LABELS) + 1), np.float16)
        x[:, -1] = 1
        for event in events[f"r{i}"]:
            x[event.frame] = np.eye(len(LABELS) + 1)[LABELS.index(event.label)]
        features[f"r{i}"] = x
    return features, events


def test_one_hot_features_give_every_event_at_its_frame():
    features, events = rallies(8)
    support = {video: events[video] for video in list(events)[:5]}
    head = SpottingHead(features, support, seed=0)
    for video in list(events)[5:]:
        found = head.predict(features[video])
        assert [(e.frame, e.label) for e in confident(found)] == [(e.frame, e.label) for e in events[video]]
        assert all(0 <= e.score <= e.event_score <= 1 for e in found)


def test_the_same_seed_gives_the_same_predictions_and_leaves_the_global_generator_alone():
    import torch

    features, events = rallies(3)
    state = torch.random.get_rng_state()
    first, second = (SpottingHead(features, events, seed=3, steps=5).predict(features["r0"]) for _ in range(2))
    assert first == second
    assert torch.equal(torch.random.get_rng_state(), state)


def test_rallies_without_events_are_rejected():
    features, _ = rallies(1)
    with pytest.raises(FewshotError, match="contain no event"):
        SpottingHead(features, {"r0": []}, seed=0)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([TENNIS, TENNIS], ("player", "court", "type", "side", "technique", "direction", "approach", "outcome")),
        (["serve_fh", "stroke_bh"], ("field_0", "field_1")),
        (["serve", "long_jump"], ("label",)),
    ],
)
def test_elements_of_labels(labels, names):
    elements = LabelElements.of(labels)
    assert elements.names == names
    assert all("_".join(elements.split(label)) == label for label in labels)
