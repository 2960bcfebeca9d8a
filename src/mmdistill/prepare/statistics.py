"""Mean and standard deviation per channel of what the model is given, streaming and exact."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, init_worker
from mmdistill.modalities import ModalitySpec, preprocess_clips


@dataclass
class Moments:
    """Count, mean and sum of squared deviations per channel, float64; batches are merged after Chan et al. (1979).

    One pass, no sums of squares of large numbers: the result equals the two-pass formula up to float64 rounding.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def empty(cls, channels: int) -> "Moments":
        """Nothing seen yet."""
        return cls(0, np.zeros(channels), np.zeros(channels))

    def add(self, x: torch.Tensor) -> None:
        """Take in (B, C, ...) values."""
        flat = x.transpose(0, 1).flatten(1).double()  # (C, N)
        mean = flat.mean(dim=1)
        squares = ((flat - mean[:, None]) ** 2).sum(dim=1).numpy()
        count, mean_of_batch = flat.shape[1], mean.numpy()
        total = self.count + count
        apart = mean_of_batch - self.mean
        self.squares += squares + apart**2 * (self.count * count / total)
        self.mean += apart * (count / total)
        self.count = total

    @property
    def std(self) -> np.ndarray:
        """Population standard deviation (division by the count), float64 (C,)."""
        return np.sqrt(self.squares / max(self.count, 1))


def dataset_statistics(
    dataset: ClipDataset,
    specs: Mapping[str, ModalitySpec],
    *,
    batch_size: int = 4,
    num_workers: int = 0,
    clips: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Moments]:
    """Moments of each modality of `dataset` as the model sees it: its crop, resizing, flow scaling and heat-maps.

    Args:
        dataset: the training dataset, so that views are drawn as in epoch 0.
        specs: by modality; their statistics are ignored.
        clips: use this many, evenly spread over the dataset; None: all.
        progress: called with the number of clips done.

    Raises:
        ValueError: for an empty dataset; `FrameError` for files.
    """
    if len(dataset) == 0:
        raise ValueError(f"no clip to take statistics of: {dataset.index.report}")
    raw = {name: specs[name].with_statistics((0.0,), (1.0,)) for name in dataset.readers}
    moments = {name: Moments.empty(spec.channels) for name, spec in raw.items()}
    chosen = np.linspace(0, len(dataset) - 1, min(clips or len(dataset), len(dataset))).round().astype(int)
    batches = [[(0, int(i)) for i in part] for part in np.array_split(chosen, -(-len(chosen) // batch_size))]
    loader = ClipLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=init_worker)
    done = 0
    for batch in loader:
        for name, spec in raw.items():
            size = (dataset.crop_size[0] // spec.input_stride, dataset.crop_size[1] // spec.input_stride)
            moments[name].add(preprocess_clips(batch[name], batch["crop_box"], spec, size))
        done += len(batch["index"])
        progress(done)
    return moments


def usable(moments: Moments, *, digits: int = 6) -> tuple[tuple[float, ...], tuple[float, ...], list[int]]:
    """Mean and std for a `ModalitySpec`, rounded; a channel that never varies gets std 1 and is listed."""
    flat = [i for i, std in enumerate(moments.std) if std < 1e-9]
    std = [1.0 if i in flat else float(f"{s:.{digits}g}") for i, s in enumerate(moments.std)]
    return tuple(float(f"{m:.{digits}g}") for m in moments.mean), tuple(std), flat
