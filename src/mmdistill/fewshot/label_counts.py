"""Which few-shot episodes the labels of a dataset supply, with each granularity of the label.

Shapes: N-way, K support and Q query clips per class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdistill.fewshot.episodes import EpisodeSpec, eligible_classes
from mmdistill.fewshot.errors import EpisodeError


@dataclass(frozen=True)
class LabelCounts:
    """The classes of one granularity.

    Attributes:
        granularity: name, for example "direction".
        num_classes: number of classes.
        smallest, median, largest: number of clips of a class.
        most_classes: the largest possible N by (K, Q, disjoint). 0: fewer than two classes have enough clips, so that
            no episode is possible.
    """

    granularity: str
    num_classes: int
    smallest: int
    median: float
    largest: int
    most_classes: dict[tuple[int, int, str | None], int]


def count_labels(
    granularity: str, labels: Sequence[str], groups: Sequence[str], shots: Sequence[int], queries: Sequence[int]
) -> LabelCounts:
    """Count the classes of one granularity and those that can take part in episodes.

    Args:
        granularity: its name.
        labels: class of each clip; "" if it has none. At least one clip has a class.
        groups: video of each clip.
        shots: values of K.
        queries: values of Q.
    """
    names, numbers = np.unique([label for label in labels if label], return_inverse=True)
    values = np.full(len(labels), -1, dtype=np.int64)
    values[[bool(label) for label in labels]] = numbers
    counts = np.bincount(numbers)
    most_classes = {}
    for disjoint in (None, "video"):
        for k_shot in shots:
            for q_sample in queries:
                try:
                    found = eligible_classes(values, EpisodeSpec(2, k_shot, q_sample, disjoint), groups=groups)
                except EpisodeError:  # fewer than two classes
                    most_classes[k_shot, q_sample, disjoint] = 0
                else:
                    most_classes[k_shot, q_sample, disjoint] = len(found.classes)
    return LabelCounts(
        granularity, len(names), int(counts.min()), float(np.median(counts)), int(counts.max()), most_classes
    )
