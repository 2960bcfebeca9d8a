"""What Lightning is taught for this project: file format, stopping, plain progress."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from mmdistill.checkpoint import load_torch, save_torch
from mmdistill.runlog import PLAIN_LINE_SECONDS
from mmdistill.runtime import INTERRUPTED_EXIT_CODE


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's files through the checkpoint layer: written atomically, verified when read, weights_only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one file; it appears under its name only when it is whole."""
        save_torch(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file. Raises where it is damaged or holds anything but data."""
        return load_torch(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file that retention gave up."""
        Path(path).unlink(missing_ok=True)


class EpochCheckpoints(ModelCheckpoint):
    """``epoch=XX-train_loss=X.XXXX.ckpt`` every `save_ckpt_freq` epochs and at the end, and ``last.ckpt``."""

    def __init__(self, directory: Path, *, save_ckpt_freq: int) -> None:
        super().__init__(
            dirpath=directory,
            filename="{epoch:02d}-{train_loss:.4f}",
            save_top_k=-1,
            save_last=True,
            every_n_epochs=save_ckpt_freq,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The last epoch is saved whether or not it is a multiple of the interval."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self._every_n_epochs = 1
        super().on_train_epoch_end(trainer, pl_module)


class SetEpoch(Callback):
    """Tells the sampler which epoch begins; the first one of a run is set when its loader is made."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the epoch's iterator is made."""
        self.sampler.set_state(trainer.current_epoch, 0)


class StopOnSignal(Callback):
    """After a signal, end at the end of the step: save ``last.ckpt`` and leave with `INTERRUPTED_EXIT_CODE`.

    A step inside an epoch is saved as it is; `resume` then repeats this epoch from its first clip with those weights,
    so stops at an epoch's end are the ones that continue to the same last bit.
    """

    def __init__(self, stop_signal: Callable[[], int | None], path: Path) -> None:
        self.stop_signal, self.path = stop_signal, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """All ranks agree on the stop."""
        if trainer.strategy.reduce_boolean_decision(self.stop_signal() is not None, all=False):
            trainer.save_checkpoint(self.path)
            if trainer.is_global_zero:
                print(f"stopped by a signal; whole checkpoint written: {self.path}", file=sys.stderr)
            raise SystemExit(INTERRUPTED_EXIT_CODE)


class EpochLines(Callback):
    """One line per epoch, and where standard error is no terminal also one every few seconds."""

    def __init__(self) -> None:
        self._began = self._said = 0.0
        self._clips = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._began, self._clips = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A plain line now and then."""
        self._clips += len(batch["index"]) * trainer.world_size
        now = time.monotonic()
        if trainer.is_global_zero and not sys.stderr.isatty() and now - self._said > PLAIN_LINE_SECONDS:
            self._said = now
            rate = self._clips / (now - self._began)
            total = trainer.num_training_batches
            print(
                f"distil epoch {trainer.current_epoch}/{trainer.max_epochs} "
                f"batch {batch_idx + 1}/{total} {rate:.0f} clips/s",
                file=sys.stderr,
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each teacher's loss beside its trivial predictor's."""
        m = {k: float(v) for k, v in trainer.callback_metrics.items()}
        parts = ", ".join(
            f"{name.removeprefix('train_loss_')} {m[name]:.4f} (trivial {m[name.replace('train', 'trivial', 1)]:.4f})"
            for name in m
            if name.startswith("train_loss_")
        )
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch}: loss {m['train_loss']:.4f}: {parts}", file=sys.stderr)
