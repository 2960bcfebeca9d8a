"""Metrics of event spotting: which stroke is played at which frame.

Tolerances (`delta`) are in frames. Definitions:

- A prediction is a true positive if an event with its label lies within delta frames. A true event without such a
  prediction is a false negative.
- Other predictions are false positives under one of two rules. ``strict``: all of them. ``published``, as F3Set's
  released code counts (arXiv 2504.08222): those without a true event of any label within delta frames.
- F1 of a label is 2 TP / (2 TP + FP + FN) over all rallies. The mean is over the labels that occur in the truth.
- The edit score is 100 (1 - Levenshtein distance / longer length) of the label sequences, averaged over rallies.
- Average precision matches predictions to true events one to one, in the order of their scores. mAP is the mean over
  the labels that occur in the truth.

All values are percentages.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter1d

from mmdistill.data.annotations.base import Event

FALSE_POSITIVE_RULES = ("strict", "published")
NMS_FRAMES = 5  # window of the non-maximum suppression


@dataclass(frozen=True)
class SpottedEvent(Event):
    """A predicted event.

    Attributes:
        score: probability of an event with this label, in [0, 1].
        event_score: probability of an event of any label at this frame, in [0, 1].
        alternatives: the most probable labels with their probabilities, which are like `score`; the first is `label`.
    """

    score: float = 1.0
    event_score: float = 1.0
    alternatives: tuple[tuple[str, float], ...] = ()


EventLists = Mapping[str, Sequence[Event]]  # by video


def suppress_non_maxima(scores: NDArray[np.float64], *, window: int = NMS_FRAMES) -> NDArray[np.int64]:
    """Frames whose score is the largest of the `window` frames around them; of equal scores the first one.

    Args:
        scores: (T,), one per frame.
        window: odd number of frames.

    Returns:
        int64 (n,), ascending.
    """
    kept: list[int] = []
    for frame in np.flatnonzero(scores == maximum_filter1d(scores, window, mode="nearest")).tolist():
        if not kept or frame - kept[-1] > window // 2:
            kept.append(frame)
    return np.array(kept, dtype=np.int64)


def f1_scores(truth: EventLists, predicted: EventLists, *, delta: int, rule: str) -> dict[str, float]:
    """F1 of each label that occurs in `truth`. `rule` is one of `FALSE_POSITIVE_RULES`."""
    hits: dict[str, int] = defaultdict(int)
    errors: dict[str, int] = defaultdict(int)  # false positives and false negatives
    labels: set[str] = set()
    for video, events in truth.items():
        found = predicted.get(video, ())
        labels |= {event.label for event in events}
        for event in events:
            errors[event.label] += not _has_label_near(found, event, delta)
        for prediction in found:
            if _has_label_near(events, prediction, delta):
                hits[prediction.label] += 1
            elif rule == "strict" or not any(abs(event.frame - prediction.frame) <= delta for event in events):
                errors[prediction.label] += 1
    return {label: 100 * 2 * hits[label] / (2 * hits[label] + errors[label]) for label in sorted(labels)}


def _has_label_near(events: Sequence[Event], wanted: Event, delta: int) -> bool:
    return any(event.label == wanted.label and abs(event.frame - wanted.frame) <= delta for event in events)


def edit_score(truth: EventLists, predicted: EventLists) -> float:
    """Mean edit score over the rallies of `truth`. A rally without true and predicted events scores 100."""
    scores = []
    for video, events in truth.items():
        a, b = ([event.label for event in sorted(found, key=_frame)] for found in (events, predicted.get(video, ())))
        scores.append(100 * (1 - _levenshtein(a, b) / max(len(a), len(b), 1)))
    return float(np.mean(scores))


def _frame(event: Event) -> int:
    return event.frame


def _levenshtein(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Smallest number of insertions, deletions and substitutions that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def average_precisions(
    truth: EventLists, predicted: Mapping[str, Sequence[SpottedEvent]], *, delta: int
) -> dict[str, float]:
    """Average precision of each label that occurs in `truth`: the area under the interpolated precision-recall curve.

    A prediction matches the nearest unmatched true event with its label within `delta` frames.
    """
    labels = sorted({event.label for events in truth.values() for event in events})
    ranked = sorted(
        ((event.score, video, event) for video in truth for event in predicted.get(video, ())),
        key=lambda entry: (-entry[0], entry[1], entry[2].frame),
    )
    result = {}
    for label in labels:
        open_frames = {video: [e.frame for e in events if e.label == label] for video, events in truth.items()}
        total = sum(map(len, open_frames.values()))
        is_hit = []
        for _, video, event in ranked:
            if event.label != label:
                continue
            near = [frame for frame in open_frames[video] if abs(frame - event.frame) <= delta]
            is_hit.append(bool(near))
            if near:
                open_frames[video].remove(min(near, key=lambda frame: abs(frame - event.frame)))
        hits = np.cumsum(is_hit)
        precision = hits / np.arange(1, len(hits) + 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        result[label] = 100 * float(precision[np.array(is_hit, dtype=bool)].sum()) / total
    return result
