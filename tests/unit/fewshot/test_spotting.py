"""The metrics of event spotting."""

import numpy as np
import pytest

from mmdistill.data.annotations.base import Event
from mmdistill.fewshot.spotting import (
    SpottedEvent,
    average_precisions,
    edit_score,
    f1_scores,
    suppress_non_maxima,
)

LABELS = ("a", "b", "c")


def random_case(rng):
    """Truth and predictions of two rallies; predictions have distinct scores."""

    def events(count, kind):
        frames = sorted(rng.choice(30, count, replace=False).tolist())
        scores = rng.permutation(100)[:count] / 100
        return [
            kind(f, str(rng.choice(LABELS)), *((1.0, float(s)) if kind is SpottedEvent else ()))
            for f, s in zip(frames, scores, strict=True)
        ]

    truth = {video: events(int(rng.integers(1, 8)), Event) for video in "xy"}
    return truth, {video: events(int(rng.integers(0, 9)), SpottedEvent) for video in "xy"}


def reference_f1(truth, predicted, delta, rule):
    """F1 by one label at a time, from sets of (video, frame)."""
    result = {}
    for label in {e.label for events in truth.values() for e in events}:
        true = {(v, e.frame) for v, events in truth.items() for e in events if e.label == label}
        every = {(v, e.frame) for v, events in truth.items() for e in events}
        found = {(v, e.frame) for v, events in predicted.items() for e in events if e.label == label}

        def near(item, others):
            return any(item[0] == v and abs(item[1] - f) <= delta for v, f in others)

        tp = sum(near(p, true) for p in found)
        fn = sum(not near(t, found) for t in true)
        fp = sum(not near(p, true) and (rule == "strict" or not near(p, every)) for p in found)
        result[label] = 100 * tp / (tp + (fp + fn) / 2)
    return result


def reference_edit(truth, predicted):
    """Edit score with the full distance matrix."""
    values = []
    for video in truth:
        a, b = [e.label for e in truth[video]], [e.label for e in predicted[video]]
        d = np.zeros((len(a) + 1, len(b) + 1))
        d[:, 0], d[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
        for i in range(len(a)):
            for j in range(len(b)):
                d[i + 1, j + 1] = min(d[i, j + 1] + 1, d[i + 1, j] + 1, d[i, j] + (a[i] != b[j]))
        values.append(1 - d[-1, -1] / max(len(a), len(b)))
    return 100 * np.mean(values)


def reference_ap(truth, predicted, delta, label):
    """Area under the precision envelope, integrated over recall."""
    ranked = sorted(
        ((e.score, v, e.frame) for v, es in predicted.items() for e in es if e.label == label),
        key=lambda t: (-t[0], t[1], t[2]),
    )
    unmatched = [(v, e.frame) for v, es in truth.items() for e in es if e.label == label]
    total, tp, recall, precision = len(unmatched), 0, [0.0], [1.0]
    for rank, (_, video, frame) in enumerate(ranked, 1):
        near = sorted((abs(f - frame), f) for v, f in unmatched if v == video and abs(f - frame) <= delta)
        if near:
            unmatched.remove((video, near[0][1]))
            tp += 1
        recall.append(tp / total)
        precision.append(tp / rank)
    envelope = [max(precision[i:]) for i in range(len(precision))]
    return 100 * sum((recall[i] - recall[i - 1]) * envelope[i] for i in range(1, len(recall)))


def test_an_independent_implementation_agrees_on_200_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(200):
        truth, predicted = random_case(rng)
        for delta in (0, 1, 2, 4):
            for rule in ("strict", "published"):
                assert f1_scores(truth, predicted, delta=delta, rule=rule) == pytest.approx(
                    reference_f1(truth, predicted, delta, rule), abs=1e-9
                )
            for label, value in average_precisions(truth, predicted, delta=delta).items():
                assert value == pytest.approx(reference_ap(truth, predicted, delta, label), abs=1e-9)
        assert edit_score(truth, predicted) == pytest.approx(reference_edit(truth, predicted), abs=1e-9)


def test_labels_shifted_by_one_frame():
    truth = {"x": [Event(5, "a"), Event(20, "b")]}
    shifted = {"x": [SpottedEvent(6, "a"), SpottedEvent(21, "b")]}
    for rule in ("strict", "published"):
        assert set(f1_scores(truth, shifted, delta=0, rule=rule).values()) == {0}
        assert set(f1_scores(truth, shifted, delta=1, rule=rule).values()) == {100}
    assert set(average_precisions(truth, shifted, delta=0).values()) == {0}
    assert set(average_precisions(truth, shifted, delta=1).values()) == {100}
    assert edit_score(truth, shifted) == 100


def test_a_wrong_label_on_the_right_frame_counts_only_under_the_strict_rule():
    truth = {"x": [Event(5, "a"), Event(20, "b")]}
    missed, wrong = {"x": [Event(20, "b")]}, {"x": [Event(5, "b"), Event(20, "b")]}
    strict = [f1_scores(truth, found, delta=1, rule="strict") for found in (missed, wrong)]
    published = [f1_scores(truth, found, delta=1, rule="published") for found in (missed, wrong)]
    assert published[0] == published[1] == {"a": 0, "b": 100}
    assert strict == [{"a": 0, "b": 100}, {"a": 0, "b": pytest.approx(200 / 3)}]


def test_an_event_far_from_all_events_is_a_false_positive_under_both_rules():
    truth, found = {"x": [Event(5, "a")]}, {"x": [Event(5, "a"), Event(12, "a")]}
    for rule in ("strict", "published"):
        assert f1_scores(truth, found, delta=1, rule=rule) == {"a": pytest.approx(200 / 3)}


def test_rallies_without_predictions_count():
    truth = {"x": [Event(5, "a")], "y": [Event(5, "a")]}
    found = {"x": [SpottedEvent(5, "a")]}
    assert f1_scores(truth, found, delta=0, rule="strict") == {"a": pytest.approx(200 / 3)}
    assert edit_score(truth, found) == 50
    assert average_precisions(truth, found, delta=0) == {"a": 50}


def test_two_predictions_of_one_event_count_once_in_average_precision():
    truth = {"x": [Event(5, "a"), Event(25, "a")]}
    found = {"x": [SpottedEvent(4, "a", score=0.9), SpottedEvent(6, "a", score=0.8)]}
    assert average_precisions(truth, found, delta=1) == {"a": 50}


def test_non_maximum_suppression_keeps_one_frame_of_five():
    scores = np.zeros(20)
    scores[[3, 4, 5, 9, 12]] = 0.5, 0.9, 0.4, 0.3, 0.8
    assert [f for f in suppress_non_maxima(scores) if scores[f] > 0] == [4, 9, 12]
    assert suppress_non_maxima(np.ones(6)).tolist() == [0, 3]  # equal scores: the first of each window
