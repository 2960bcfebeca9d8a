"""Teacher features that are computed once: ``trainer.cache_teacher_epochs=N``.

Clip c in epoch e uses the mask and the crop of mask draw ``e % N``. In the first N epochs the teachers run and their
features are stored. From epoch N on the features are looked up: the teachers do not run, and only the frames of a clip
are read. The losses equal those of a training without the cache on the same masks.

A draw is stored in the run folder as ``teacher_features/DIGEST/draw_K.npy``, float32 [clips, D of all teachers], and
``draw_K_known.npy``, bool [clips]. The digest covers the teachers' weights and everything that decides their inputs, so
features of other settings are never used. Features that a draw lacks at its first use are computed then: those of clips
dropped in that epoch, or of an epoch that was stopped. A resumed run uses the files that exist.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import Subset

from mmdistill.builders import make_clip_loader
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.distributed.collectives import all_gather_objects, barrier, broadcast_object, get_rank, get_world_size
from mmdistill.errors import format_count
from mmdistill.files import atomic_open
from mmdistill.modalities import ModalitySpec
from mmdistill.models.pooling import Pooling
from mmdistill.training.run import Training


class TeacherCache:
    """Teacher features of N mask draws.

    Args:
        run_dir: the run's folder; all ranks see the same files.
        num_draws: N.
        num_clips: number of clips in the dataset.
        widths: width of each teacher's feature, by modality.
        key: plain containers that decide the features; see `cache_key`.
    """

    def __init__(self, run_dir: Path, *, num_draws: int, num_clips: int, widths: Mapping[str, int], key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.directory = run_dir / "teacher_features" / digest
        self.num_draws, self.num_clips, self.widths = num_draws, num_clips, dict(widths)
        # this rank's features of the draw that is being collected
        self._rows = torch.zeros(num_clips, sum(self.widths.values()))
        self._known = torch.zeros(num_clips, dtype=torch.bool)
        self._current_draw: int | None = None
        self._opened: dict[int, tuple[Tensor, Tensor]] = {}  # draw -> features and known clips of all ranks

    def is_cached(self, epoch: int) -> bool:
        """Whether the features of this epoch are looked up."""
        return epoch >= self.num_draws

    def add(self, epoch: int, index: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Store the features of a batch; `index` are clip numbers (B,), `targets` (B, D) by modality."""
        self._select_draw(epoch % self.num_draws)
        rows = index.cpu()
        self._rows[rows] = torch.cat([targets[m].detach().float().cpu() for m in self.widths], dim=1)
        self._known[rows] = True

    def features(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """The features of a batch of clips, on the device of `index`, (B, D) each. The draw must be open.

        Raises:
            ValueError: a clip has no features.
        """
        features, known = self._opened[epoch % self.num_draws]
        rows = index.cpu()
        if not bool(known[rows].all()):
            raise ValueError(
                f"{self.directory}: no features of some of the clips {index.tolist()}; delete the folder, they are "
                "then computed again"
            )
        parts = features[rows].to(index.device).split(list(self.widths.values()), dim=1)
        return dict(zip(self.widths, parts, strict=True))

    def is_open(self, epoch: int) -> bool:
        """Whether `features` can be called for this epoch."""
        return epoch % self.num_draws in self._opened

    def known_clips(self, draw: int) -> Tensor:
        """Which clips have features in the draw's file, bool (clips,)."""
        path = self._path(draw, "_known")
        return torch.from_numpy(np.load(path)) if path.exists() else torch.zeros(self.num_clips, dtype=torch.bool)

    def open(self, draw: int) -> None:
        """Map the draw's file into memory, read-only; the ranks of a machine share its pages."""
        self._opened[draw] = torch.from_numpy(np.load(self._path(draw), mmap_mode="c")), self.known_clips(draw)

    def write(self, draw: int) -> None:
        """Gather the collected features of all ranks and add them to the draw's file. Collective."""
        self._select_draw(draw)
        if get_world_size() > 1:
            own = self._known.nonzero().flatten()
            for index, values in all_gather_objects((own, self._rows[own])):
                self._rows[index], self._known[index] = values, True
        if get_rank() == 0:
            rows, known, known_before = self._rows, self._known, self.known_clips(draw)
            if known_before.any():
                old_rows = torch.from_numpy(np.load(self._path(draw)))
                rows = torch.where((known_before & ~known)[:, None], old_rows, rows)
                known = known | known_before
            for suffix, array in (("", rows), ("_known", known)):  # in this order: a known clip has its features
                with atomic_open(self._path(draw, suffix)) as file:
                    np.save(file, array.numpy())
        barrier()
        self._current_draw = None

    def _select_draw(self, draw: int) -> None:
        """Start to collect the features of a draw, if it is not the current one."""
        if self._current_draw != draw:
            self._current_draw = draw
            self._rows.zero_()
            self._known.zero_()

    def _path(self, draw: int, suffix: str = "") -> Path:
        return self.directory / f"draw_{draw}{suffix}.npy"


def cache_key(
    dataset: ClipDataset,
    teachers: Mapping[str, Any],
    specs: Mapping[str, ModalitySpec],
    precision: str,
    pooling: Pooling,
) -> dict[str, Any]:
    """Everything that decides the features: the teachers' digests, the clips, their files and the preprocessing.

    Collective: all ranks use rank 0's fingerprint of the data, because copies of the files on other machines have other
    modification times.
    """
    fingerprints = {m: data_fingerprint(dataset, m) for m in dataset.readers} if get_rank() == 0 else {}
    crop, mask = dataset.crop, dataset.mask
    return {
        "teachers": {name: source["sha256"] for name, source in teachers.items()},
        "data": broadcast_object(fingerprints),
        "inputs": {m: repr(specs[m]) for m in dataset.readers},
        "mask": [
            mask.mask_type,
            mask.mask_ratio,
            list(mask.grid),
            *([mask.mask_temperature, dataset.motion_source] if mask.mask_type == "motion" else []),
        ],
        "crop_box": [
            list(crop.crop_size),
            list(crop.frame_size),
            crop.random_crop_min_scale,
            crop.hflip_prob,
            *([crop.resize] if crop.resize != "crop" else []),  # the digests of earlier versions stay valid
        ],
        "seed": dataset.seed,
        "precision": precision,
        **({"pooling": str(pooling)} if pooling.name != "mean" else {}),
    }


class TeacherCacheCallback(Callback):
    """Write each draw at the end of its epoch, and complete it before its first reuse."""

    def __init__(self, cache: TeacherCache, training: Training) -> None:
        self.cache, self.training = cache, training

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch's draw. Collective."""
        if not self.cache.is_cached(trainer.current_epoch):
            self.cache.write(trainer.current_epoch % self.cache.num_draws)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Open the epoch's draw. Not in `on_train_epoch_start`, which Lightning skips if a run resumes inside an epoch.

        Collective.
        """
        epoch, cache = trainer.current_epoch, self.cache
        if not cache.is_cached(epoch) or cache.is_open(epoch):
            return
        draw = epoch % cache.num_draws
        missing = (~cache.known_clips(draw)).nonzero().flatten().tolist()
        if missing:
            self._compute_features(trainer, pl_module, draw, missing)
        cache.open(draw)
        computed = f"{len(missing)} of {format_count(cache.num_clips, 'clip')} computed"
        self.training.log.info(f"teacher cache: mask draw {draw} from {cache.directory}, {computed}")

    def _compute_features(self, trainer: pl.Trainer, pl_module: Any, draw: int, clips: list[int]) -> None:
        own_clips: Any = [(draw, i) for i in clips[trainer.global_rank :: trainer.world_size]]
        loader = make_clip_loader(
            Subset(self.training.data.dataset, own_clips),
            num_workers=self.training.config.num_workers,
            pin_memory=False,
            batch_size=self.training.config.batch_size,
        )
        for batch in loader:  # outside of autocast, which does not support all dtypes of a collation
            batch = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.train_step_context(), torch.no_grad():
                self.cache.add(draw, batch["index"], pl_module.targets(batch))
        self.cache.write(draw)
