"""Mean and standard deviation per channel of the model input, computed in one pass."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
from sklearn.preprocessing import StandardScaler

from mmdistill.data.cores import default_loader_workers
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, init_worker
from mmdistill.modalities import ModalitySpec, preprocess_clips

MIN_STD = 1e-9  # channels with a smaller standard deviation are constant


def dataset_statistics(
    dataset: ClipDataset,
    specs: Mapping[str, ModalitySpec],
    *,
    batch_size: int = 4,
    num_workers: int | None = 0,
    clips: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, StandardScaler]:
    """Statistics of each modality of `dataset` as model input: after cropping, resizing, flow scaling and heat-maps.

    The crops are those of epoch 0. Mean and std of `specs` are ignored. `clips` is the number of clips, evenly spaced
    over the dataset; None: all. `progress` is called with the number of processed clips. `num_workers` None: see
    `default_loader_workers`. The float64 results have one feature per channel: ``mean_``, ``var_`` (division by the
    count), ``n_samples_seen_``.

    Raises:
        ValueError: the dataset is empty.
        FrameError: a file cannot be read.
    """
    if len(dataset) == 0:
        raise ValueError(f"the dataset has no clip to compute statistics of: {dataset.index.report}")
    raw = {name: replace(specs[name], mean=(0.0,), std=(1.0,)) for name in dataset.readers}
    scalers = {name: StandardScaler() for name in raw}
    chosen = np.linspace(0, len(dataset) - 1, min(clips or len(dataset), len(dataset))).round().astype(int)
    batches = [[(0, int(i)) for i in batch] for batch in np.array_split(chosen, -(-len(chosen) // batch_size))]
    num_workers = default_loader_workers() if num_workers is None else num_workers
    loader = ClipLoader(dataset, batch_sampler=batches, num_workers=num_workers, worker_init_fn=init_worker)
    height, width = dataset.crop.crop_size
    done = 0
    for batch in loader:
        for name, spec in raw.items():
            size = (height // spec.input_stride, width // spec.input_stride)
            x = preprocess_clips(batch[name], batch["crop_box"], spec, size)  # (B, C, T, h, w)
            scalers[name].partial_fit(x.transpose(0, 1).flatten(1).T.double().numpy())
        done += len(batch["index"])
        progress(done)
    return scalers


def to_mean_std(scaler: StandardScaler, *, digits: int = 6) -> tuple[tuple[float, ...], tuple[float, ...], list[int]]:
    """Mean and std for a `ModalitySpec`, rounded to `digits`, and the constant channels, whose std is set to 1."""
    stds = np.sqrt(scaler.var_)
    constant = [i for i, std in enumerate(stds) if std < MIN_STD]
    std = [1.0 if i in constant else float(f"{s:.{digits}g}") for i, s in enumerate(stds)]
    return tuple(float(f"{m:.{digits}g}") for m in scaler.mean_), tuple(std), constant
