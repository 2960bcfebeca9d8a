"""Teacher features that are computed once: ``trainer.cache_teacher_epochs=N``.

With N draws, clip c in epoch e has the mask and the view of epoch ``e % N``. In the first N epochs teachers run as ever
and their features are kept; from epoch N on they are looked up, teachers stay idle, and of a clip's files only its
frames are read. A training without the cache, on the same masks, has the same losses.

A draw lies in the run's folder as ``teacher_features/DIGEST/draw_K.npy``, float32 [clips, D of all teachers], and
``draw_K_known.npy``, bool [clips]. The digest is of the teachers' weights and of what decides their inputs, so
that other features are never taken for these. What a draw lacks at its first use (the clips left out of that epoch,
or those of an epoch that was stopped) is computed then; a resumed run goes on with the files that are there.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import Subset

from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, init_worker
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.distributed.collectives import all_gather_objects, barrier, broadcast_object, get_rank, get_world_size
from mmdistill.files import atomic_open
from mmdistill.modalities import ModalitySpec


class TeacherCache:
    """Features of N mask draws.

    Args:
        folder: of the run; all ranks see the same files.
        draws: N.
        clips: number of clips in the dataset.
        widths: width of each teacher's feature, by modality.
        key: plain containers that decide the features; see `cache_key`.
    """

    def __init__(self, folder: Path, *, draws: int, clips: int, widths: Mapping[str, int], key: Any) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder / "teacher_features" / digest
        self.draws, self.clips, self.widths = draws, clips, dict(widths)
        self._rows = torch.zeros(clips, sum(self.widths.values()))  # of the draw at hand, this rank's
        self._known = torch.zeros(clips, dtype=torch.bool)
        self._filling: int | None = None
        self._open: dict[int, tuple[Tensor, Tensor]] = {}  # whole draws: rows, and which are known

    def serves(self, epoch: int) -> bool:
        """Whether this epoch's features are looked up."""
        return epoch >= self.draws

    def add(self, epoch: int, index: Tensor, targets: Mapping[str, Tensor]) -> None:
        """Keep the features of a batch; `index` are clip numbers (B,), `targets` (B, D) by modality."""
        self._begin(epoch % self.draws)
        rows = index.cpu()
        self._rows[rows] = torch.cat([targets[m].detach().float().cpu() for m in self.widths], dim=1)
        self._known[rows] = True

    def features(self, epoch: int, index: Tensor) -> dict[str, Tensor]:
        """The features of a batch of clips, on the device of `index`, once the draw is open. (B, D) each

        Raises:
            ValueError: a clip has none.
        """
        open_rows, known = self._open[epoch % self.draws]
        if not bool(known[index.cpu()].all()):
            raise ValueError(f"{self.folder} lacks features of the clips {index.tolist()}; remove the folder")
        rows = open_rows[index.cpu()].to(index.device)
        parts = rows.split(list(self.widths.values()), dim=1)
        return dict(zip(self.widths, parts, strict=True))

    def is_open(self, epoch: int) -> bool:
        """Whether `features` can be asked for this epoch's."""
        return epoch % self.draws in self._open

    def known(self, draw: int) -> Tensor:
        """Which clips' features are in the draw's file, bool (clips,)."""
        path = self._path(draw, "_known")
        return torch.from_numpy(np.load(path)) if path.exists() else torch.zeros(self.clips, dtype=torch.bool)

    def open(self, draw: int) -> None:
        """Map the draw's file into memory, read-only: the ranks of a machine share its pages."""
        self._open[draw] = torch.from_numpy(np.load(self._path(draw), mmap_mode="c")), self.known(draw)

    def write(self, draw: int) -> None:
        """Put the ranks' rows together and into the draw's file, beside those that are there. Collective."""
        self._begin(draw)
        rows, known = self._rows, self._known
        if get_world_size() > 1:
            own = known.nonzero().flatten()
            for index, values in all_gather_objects((own, rows[own])):
                rows[index], known[index] = values, True
        if get_rank() == 0:
            self._merge(draw, rows, known)
        barrier()
        self._filling = None

    def _merge(self, draw: int, rows: Tensor, known: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self.known(draw)
        if before.any():
            old = torch.from_numpy(np.load(self._path(draw)))
            rows = torch.where((before & ~known)[:, None], old, rows)
            known = known | before
        for name, array in (("", rows), ("_known", known)):  # in this order: no row is known before it is there
            with atomic_open(self._path(draw, name)) as file:
                np.save(file, array.numpy())

    def _begin(self, draw: int) -> None:
        if self._filling != draw:
            self._filling = draw
            self._rows.zero_()
            self._known.zero_()

    def _path(self, draw: int, suffix: str = "") -> Path:
        return self.folder / f"draw_{draw}{suffix}.npy"


def cache_key(
    dataset: ClipDataset, teachers: Mapping[str, Any], specs: Mapping[str, ModalitySpec], precision: str
) -> dict[str, Any]:
    """What decides the features: the teachers' digests, the clips, their files, and what is made of these.

    Rank 0's on every rank: copies of the data on other machines' disks have other times of change.
    """
    versions = {m: data_fingerprint(dataset, m) for m in dataset.readers} if get_rank() == 0 else {}
    return {
        "teachers": {name: source["sha256"] for name, source in teachers.items()},
        "data": broadcast_object(versions),
        "inputs": {m: repr(specs[m]) for m in dataset.readers},
        "mask": [dataset.mask_kind, dataset.mask_ratio, list(dataset.grid)],
        "crop_box": [list(dataset.crop_size), list(dataset.frame_size), dataset.min_scale, dataset.flip],
        "seed": dataset.seed,
        "precision": precision,
    }


class TeacherCacheCallback(Callback):
    """Writes each draw at the end of its epoch, and completes it before its first reuse."""

    def __init__(self, cache: TeacherCache, dataset: ClipDataset, *, batch_size: int, num_workers: int) -> None:
        self.cache, self.dataset = cache, dataset
        self.batch_size, self.num_workers = batch_size, num_workers

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """All ranks are here."""
        if not self.cache.serves(trainer.current_epoch):
            self.cache.write(trainer.current_epoch % self.cache.draws)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Not at an epoch's start, which Lightning leaves out where a run resumes inside an epoch."""
        epoch, cache = trainer.current_epoch, self.cache
        if not cache.serves(epoch) or cache.is_open(epoch):
            return
        draw = epoch % cache.draws
        missing = (~cache.known(draw)).nonzero().flatten().tolist()
        if missing:
            self._compute(trainer, pl_module, draw, missing)
        cache.open(draw)
        if trainer.is_global_zero:
            print(
                f"teacher cache: mask draw {draw} from {cache.folder}, {len(missing)} of {cache.clips} clips computed",
                file=sys.stderr,
                flush=True,
            )

    def _compute(self, trainer: pl.Trainer, pl_module: Any, draw: int, missing: list[int]) -> None:
        mine = [(draw, i) for i in missing[trainer.global_rank :: trainer.world_size]]
        loader = ClipLoader(
            Subset(self.dataset, mine),  # type: ignore[arg-type]
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            worker_init_fn=init_worker,
        )
        with trainer.precision_plugin.train_step_context(), torch.no_grad():
            for batch in loader:
                batch = trainer.strategy.batch_to_device(batch)
                self.cache.add(draw, batch["index"], pl_module.targets(batch))
        self.cache.write(draw)
