"""Mean and standard deviation per channel of the model input, computed in one pass."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, init_worker
from mmdistill.modalities import ModalitySpec, preprocess_clips


@dataclass
class Moments:
    """Running count, mean and sum of squared deviations per channel, float64.

    Batches are merged with the formula of Chan et al. (1979). It needs one pass and no sum of large squares; the result
    equals the two-pass formula up to float64 rounding.
    """

    count: int
    mean: np.ndarray
    squared_deviations: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "Moments":
        """Moments of no value."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    def update(self, x: torch.Tensor) -> None:
        """Add the values of a batch (B, C, ...)."""
        flat = x.transpose(0, 1).flatten(1).double()  # (C, N)
        batch_mean = flat.mean(dim=1)
        squared_deviations = ((flat - batch_mean[:, None]) ** 2).sum(dim=1).numpy()
        batch_count = flat.shape[1]
        total = self.count + batch_count
        delta = batch_mean.numpy() - self.mean
        self.squared_deviations += squared_deviations + delta**2 * (self.count * batch_count / total)
        self.mean += delta * (batch_count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation (division by the count), float64 (C,)."""
        std: np.ndarray = np.sqrt(self.squared_deviations / max(self.count, 1))
        return std


def dataset_statistics(
    dataset: ClipDataset,
    specs: Mapping[str, ModalitySpec],
    *,
    batch_size: int = 4,
    num_workers: int = 0,
    clips: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Moments]:
    """Moments of each modality of `dataset` as model input: after cropping, resizing, flow scaling and heat-maps.

    Args:
        dataset: the training dataset. Its crops are those of epoch 0.
        specs: by modality. Their mean and std are ignored.
        batch_size: clips that are processed together.
        num_workers: processes of the data loader.
        clips: number of clips, evenly spaced over the dataset; None: all.
        progress: called with the number of processed clips.

    Raises:
        ValueError: if the dataset is empty.
        FrameError: if a file cannot be read.
    """
    if len(dataset) == 0:
        raise ValueError(f"the dataset has no clip to compute statistics of: {dataset.index.report}")
    raw = {name: specs[name].with_statistics((0.0,), (1.0,)) for name in dataset.readers}
    moments = {name: Moments.empty(spec.channels) for name, spec in raw.items()}
    chosen = np.linspace(0, len(dataset) - 1, min(clips or len(dataset), len(dataset))).round().astype(int)
    batches = [[(0, int(i)) for i in batch] for batch in np.array_split(chosen, -(-len(chosen) // batch_size))]
    loader = ClipLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=init_worker)
    done = 0
    for batch in loader:
        for name, spec in raw.items():
            size = (dataset.crop_size[0] // spec.input_stride, dataset.crop_size[1] // spec.input_stride)
            moments[name].update(preprocess_clips(batch[name], batch["crop_box"], spec, size))
        done += len(batch["index"])
        progress(done)
    return moments


def to_mean_std(moments: Moments, *, digits: int = 6) -> tuple[tuple[float, ...], tuple[float, ...], list[int]]:
    """Mean and std for a `ModalitySpec`, rounded to `digits`, and the constant channels, whose std is set to 1."""
    constant = [i for i, std in enumerate(moments.std) if std < 1e-9]
    std = [1.0 if i in constant else float(f"{s:.{digits}g}") for i, s in enumerate(moments.std)]
    return tuple(float(f"{m:.{digits}g}") for m in moments.mean), tuple(std), constant
