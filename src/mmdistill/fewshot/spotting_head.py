"""A small temporal network that finds labeled events in per-frame features of a frozen encoder.

It is trained on a few labeled rallies in seconds on a CPU. Shapes: K rallies, T frames, D feature width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmdistill.data.annotations.f3set import F3SET_FIELDS
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.spotting import EventLists, SpottedEvent, suppress_non_maxima
from mmdistill.randomness import seed_torch

FrameFeatures = Mapping[str, NDArray[np.floating]]
"""(T, D) by video"""

MIN_EVENT_SCORE = 0.01  # candidates below it are dropped
# Chosen on the demo data: events are rare, and with plain cross-entropy many of them score below 0.5.
EVENT_WEIGHT = 4.0  # of frames with an event in the loss
NEIGHBOR_TARGET = 0.3  # target of the frames next to an event
CONTEXT_FRAMES = 7  # on each side of a frame, on which the outputs at this frame depend
CHUNK_FRAMES = 8192  # of a long video that are predicted at once
NUM_ALTERNATIVES = 3  # labels of a predicted event


@dataclass(frozen=True)
class LabelElements:
    """The elements of labels, which are joined by ``_``.

    Attributes:
        names: one name per element: F3Set's eight fields, ``field_0`` ... for another number of fields, or ``label``
            if the labels have different numbers of fields.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Sequence[str]) -> "LabelElements":
        """The elements that all of these labels have."""
        counts = {len(label.split("_")) for label in labels}
        if len(counts) != 1:
            return cls(("label",))
        count = counts.pop()
        return cls(F3SET_FIELDS if count == len(F3SET_FIELDS) else tuple(f"field_{i}" for i in range(count)))

    def split(self, label: str) -> tuple[str, ...]:
        """The values of a label, one per element."""
        return (label,) if self.names == ("label",) else tuple(label.split("_"))


class _TemporalNetwork(nn.Module):
    """Residual dilated convolutions over time, see `CONTEXT_FRAMES`, and one linear output layer."""

    def __init__(self, width: int, outputs: int, *, hidden: int = 128, dropout: float = 0.5) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(width, hidden, 1)
        self.layers = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.output = nn.Conv1d(hidden, outputs, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(K, D, T) -> (K, outputs, T)."""
        x = self.reduce(self.dropout(x))
        for layer in self.layers:
            x = x + self.dropout(F.gelu(layer(x)))
        out: Tensor = self.output(x)
        return out


class SpottingHead:
    """Finds events and their labels in per-frame features.

    Each element of the label has its own outputs; an element can only have a value that occurs in the labeled rallies.

    Args:
        features: (T, D) of each labeled rally.
        events: its events; all have a label.
        seed: seed of the initialization and the dropout.
        known: bool (T,) of each labeled rally: the frames for which it is known whether an event is there. Only these
            are trained on. None: all frames.

    Raises:
        FewshotError: there is no event.
    """

    def __init__(
        self,
        features: FrameFeatures,
        events: EventLists,
        *,
        seed: int,
        steps: int = 200,
        known: Mapping[str, NDArray[np.bool_]] | None = None,
    ) -> None:
        labels = [event.label for found in events.values() for event in found]
        if not labels:
            raise FewshotError("the labeled rallies contain no event; select other rallies")
        self.elements = LabelElements.of(labels)
        split = [self.elements.split(label) for label in labels]
        self.values = [sorted(set(column)) for column in zip(*split, strict=True)]
        stacked = np.concatenate([features[video] for video in events]).astype(np.float32)
        self._mean, self._std = stacked.mean(axis=0), stacked.std(axis=0) + 1e-6
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            self._network = _TemporalNetwork(stacked.shape[1], 1 + sum(map(len, self.values)))
            self._fit(features, events, steps, known)

    def normalize(self, features: NDArray[np.floating]) -> NDArray[np.float32]:
        """Features with mean 0 and standard deviation 1 over the frames of the labeled rallies: (T, D) -> (T, D)."""
        normalized: NDArray[np.float32] = (features.astype(np.float32) - self._mean) / self._std
        return normalized

    def _fit(
        self,
        features: FrameFeatures,
        events: EventLists,
        steps: int,
        known: Mapping[str, NDArray[np.bool_]] | None,
    ) -> None:
        inputs = [torch.from_numpy(self.normalize(features[video])).T for video in events]  # (D, T) each
        length = max(x.shape[1] for x in inputs)
        x = torch.stack([F.pad(clip, (0, length - clip.shape[1])) for clip in inputs])  # (K, D, T)
        is_frame = torch.stack([torch.arange(length) < clip.shape[1] for clip in inputs])  # (K, T)
        if known is not None:
            for row, video in enumerate(events):
                is_frame[row, : len(known[video])] = torch.from_numpy(known[video])
        is_event = torch.zeros(len(inputs), length)
        targets = torch.full((len(self.values), len(inputs), length), -1)  # -1: no event at this frame
        for row, found in enumerate(events.values()):
            for event in found:
                is_event[row, event.frame] = 1
                for element, value in enumerate(self.elements.split(event.label)):
                    targets[element, row, event.frame] = self.values[element].index(value)
        next_to_event = F.max_pool1d(is_event[:, None], 3, stride=1, padding=1)[:, 0]
        is_event = torch.maximum(is_event, NEIGHBOR_TARGET * next_to_event)
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=3e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        sizes = [len(values) for values in self.values]
        self._network.train()
        for _ in range(steps):
            event_logits, *element_logits = self._network(x).split([1, *sizes], dim=1)
            loss = F.binary_cross_entropy_with_logits(
                event_logits[:, 0][is_frame], is_event[is_frame], pos_weight=torch.tensor(EVENT_WEIGHT)
            )
            for logits, target in zip(element_logits, targets, strict=True):
                loss = loss + F.cross_entropy(logits, target, ignore_index=-1) / len(sizes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        self._network.eval()

    def predict(self, features: NDArray[np.floating]) -> list[SpottedEvent]:
        """The candidates of a rally after non-maximum suppression: (T, D) -> events in the order of their frames."""
        event_logits, *element_logits = self._outputs(features).split([1, *map(len, self.values)])
        scores = event_logits[0].sigmoid().double().numpy()
        found = []
        for frame in suppress_non_maxima(scores).tolist():
            if scores[frame] < MIN_EVENT_SCORE:
                continue
            labels = self._most_probable([logits[:, frame].softmax(dim=0).tolist() for logits in element_logits])
            alternatives = tuple((label, scores[frame] * probability) for label, probability in labels)
            found.append(SpottedEvent(frame, *alternatives[0], float(scores[frame]), alternatives))
        return found

    def _outputs(self, features: NDArray[np.floating]) -> Tensor:
        """(T, D) -> (outputs, T), in chunks, with the frames around each chunk on which it depends."""
        parts = []
        for start in range(0, len(features), CHUNK_FRAMES):
            first = max(0, start - CONTEXT_FRAMES)
            x = torch.from_numpy(self.normalize(features[first : start + CHUNK_FRAMES + CONTEXT_FRAMES])).T
            with torch.inference_mode():
                parts.append(self._network(x[None])[0, :, start - first :][:, :CHUNK_FRAMES])
        return torch.cat(parts, dim=1)

    def _most_probable(self, probabilities: Sequence[Sequence[float]]) -> list[tuple[str, float]]:
        """The most probable labels, given the probabilities of the values of each element, which are independent."""
        labels: list[tuple[tuple[str, ...], float]] = [((), 1.0)]
        for values, ps in zip(self.values, probabilities, strict=True):
            extended = [((*label, v), q * p) for label, q in labels for v, p in zip(values, ps, strict=True)]
            labels = sorted(extended, key=lambda item: -item[1])[:NUM_ALTERNATIVES]
        return [("_".join(label), probability) for label, probability in labels]


def confident(events: Sequence[SpottedEvent], threshold: float = 0.5) -> list[SpottedEvent]:
    """The events whose `event_score` is at least `threshold`."""
    return [event for event in events if event.event_score >= threshold]
