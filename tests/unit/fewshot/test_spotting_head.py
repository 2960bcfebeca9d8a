"""The temporal head on features whose events are known."""

import numpy as np
import pytest

from mmdistill.data.annotations.base import Event
from mmdistill.fewshot import spotting_head
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


def test_only_known_frames_are_trained_on():
    """Events at frames that are not known are no background: without the mask the head learns to ignore them."""
    features, events = rallies(6)
    partial = {video: found[::2] for video, found in events.items()}
    known = {video: np.zeros(len(features[video]), dtype=bool) for video in events}
    for video, found in partial.items():
        for event in found:
            known[video][max(0, event.frame - 4) : event.frame + 5] = True
    head = SpottingHead(features, partial, seed=0, known=known)
    found = [event.frame for event in confident(head.predict(features["r0"]))]
    assert found == [event.frame for event in events["r0"]]


def test_alternatives_are_the_most_probable_labels():
    features, events = rallies(4)
    head = SpottingHead(features, events, seed=0, steps=3)
    for event in head.predict(features["r0"]):
        labels, scores = zip(*event.alternatives, strict=True)
        assert (labels[0], scores[0]) == (event.label, event.score)
        assert list(scores) == sorted(scores, reverse=True)
        assert len(set(labels)) == 3
        assert sum(scores) <= event.event_score + 1e-9


def test_a_long_video_is_predicted_in_chunks_with_the_same_result(monkeypatch: pytest.MonkeyPatch):
    features, events = rallies(5)
    head = SpottingHead(features, events, seed=0, steps=10)
    whole = [(e.frame, e.label, pytest.approx(e.score, abs=1e-6)) for e in head.predict(features["r0"])]
    monkeypatch.setattr(spotting_head, "CHUNK_FRAMES", 13)
    assert [(e.frame, e.label, e.score) for e in head.predict(features["r0"])] == whole
