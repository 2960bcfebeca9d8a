"""Lightning plugins and callbacks: checkpoint files, epochs, stop signals, exact epoch means."""

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Callback, Checkpoint

from mmdistill.checkpoint import load_torch, prune, save_torch
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.retention import best_checkpoint, link_or_copy
from mmdistill.distill.module import training_position
from mmdistill.distill.validation import METRIC
from mmdistill.distributed.collectives import all_gather_objects, get_rank, get_world_size, run_on_all_ranks
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from mmdistill.randomness import seed_step
from mmdistill.training.signals import StopSignal, stop_message

LAST = "last.ckpt"


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's checkpoint I/O through the checkpoint layer: atomic writes, checksums, ``weights_only``."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write one file; it appears under its name only when it is complete."""
        save_torch(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file. Raises `CheckpointError` if it is damaged or contains anything but data."""
        content: dict[str, Any] = load_torch(Path(path))
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        Path(path).unlink(missing_ok=True)


class EpochCheckpoints(Checkpoint):
    """``epoch=XX-train_loss=X.XXXX.ckpt`` every `save_ckpt_freq` epochs and at the end, and ``last.ckpt``.

    ``last.ckpt`` is a hard link to the newest of them (a copy where the disk has no links). Each checkpoint stores the
    losses and validations of all checkpoints of the training, so a run that resumes in another folder knows the best.

    Args:
        directory: the folder of checkpoints.
        save_ckpt_freq: epochs between files.
        keep_last: see `checkpoint.prune`.
        save_top_k: see `checkpoint.prune`.
        monitor: metric that decides the best: ``train_loss`` or ``val_top1_action``.
        source: the checkpoint that the run resumes from, which is never removed.
        stop_signal: returns the received stop signal. After a signal in the last step of an epoch, the run stops here.
    """

    def __init__(
        self,
        directory: Path,
        *,
        save_ckpt_freq: int,
        keep_last: int | None,
        save_top_k: int | None,
        monitor: str,
        source: Path | None,
        stop_signal: StopSignal,
    ) -> None:
        self.directory, self.save_ckpt_freq = directory, save_ckpt_freq
        self.keep_last, self.save_top_k, self.source = keep_last, save_top_k, source
        self.stop_signal = stop_signal
        self.monitor = monitor
        self.losses: dict[str, float] = {}  # absolute path -> loss
        self.validations: dict[str, float] = {}  # absolute path -> val_top1_action, of validated epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save every `save_ckpt_freq` epochs, at the last epoch, and after a stop signal."""
        epoch, loss = trainer.current_epoch, float(trainer.callback_metrics.get("train_loss", float("nan")))
        is_last_epoch = epoch + 1 == trainer.max_epochs
        stop = not is_last_epoch and should_stop(trainer, self.stop_signal)
        if is_last_epoch or (epoch + 1) % self.save_ckpt_freq == 0:
            path = (self.directory / f"epoch={epoch:02d}-train_loss={loss:.4f}.ckpt").absolute()
            self.losses[str(path)] = loss
            if METRIC in trainer.callback_metrics and (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
                self.validations[str(path)] = float(trainer.callback_metrics[METRIC])
            trainer.save_checkpoint(path, weights_only=False)
            run_on_all_ranks(
                lambda: self._prune_checkpoints(path) if trainer.is_global_zero else None, error_class=CheckpointError
            )
        elif stop:
            trainer.save_checkpoint(self.directory / LAST, weights_only=False)
        if stop:  # unlike an exit here, this lets Lightning finish the epoch
            trainer.should_stop = True
            _rank_zero_info(trainer, stop_message(self.directory / LAST))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the best checkpoint."""
        best = best_checkpoint(self._scores())
        if best is not None:
            values = self.losses if self.monitor == "train_loss" else self.validations
            _rank_zero_info(trainer, f"best checkpoint: {best} ({self.monitor} {values[str(best)]:.4f})")

    def _scores(self) -> dict[str, float]:
        """Score of each checkpoint by path; the lowest is the best."""
        return self.losses if self.monitor == "train_loss" else {p: -v for p, v in self.validations.items()}

    def state_dict(self) -> dict[str, Any]:
        """The losses and validations of all checkpoints of this training."""
        return {"losses": dict(self.losses), "validations": dict(self.validations)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses and validations of the resumed run."""
        self.losses = {str(k): float(v) for k, v in state_dict["losses"].items()}
        self.validations = {str(k): float(v) for k, v in state_dict.get("validations", {}).items()}

    def _prune_checkpoints(self, path: Path) -> None:
        """Link ``last.ckpt`` to `path` and remove old checkpoints."""
        link_or_copy(path, self.directory / LAST)
        prune(
            self.directory,
            keep_last=self.keep_last,
            save_top_k=self.save_top_k,
            protect=[self.source] if self.source else [],
            external_losses=self.losses,
            scores=None if self.monitor == "train_loss" else self._scores(),
        )


class SetEpochCallback(Callback):
    """Set the sampler's epoch and seed each step. `DistillData` sets the first epoch when it creates the loader.

    All randomness in a step depends on (seed, epoch, batch, rank) alone, so a resumed run needs no generator state.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Restore the schedule at the sampler's position."""
        pl_module.restore_schedule(self.sampler.epoch, self.sampler.start_batch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the epoch's iterator is created; Lightning skips it if a run resumes inside an epoch."""
        self.sampler.set_state(trainer.current_epoch, 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Seed the step."""
        seed_step(self.seed, trainer.current_epoch, index, trainer.global_rank)


class EpochMeans(Callback):
    """Means of the steps' ``values`` over the clips of an epoch and all ranks, exact also after a resume.

    Lightning's own means restart from zero at a resume. These sums (float64) are stored in the checkpoint, one list per
    rank, so the means of a resumed epoch are bit-identical to those of an uninterrupted one.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # sums of value x clips for each value; last element: number of clips

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the sums."""
        self.sums = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step's values without a device synchronization."""
        values = outputs["values"]
        if not values:  # the loss was not finite
            return
        self.names, num_clips = list(values), len(batch["index"])
        step = torch.stack([v.detach().double() for v in values.values()] + [torch.ones_like(outputs["loss"]).double()])
        step *= num_clips
        self.sums = step if self.sums is None else self.sums.to(step.device) + step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the means."""
        if self.sums is None:
            return
        total = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        means = (total[:-1] / total[-1]).float()
        pl_module.log_dict(dict(zip(self.names, means, strict=True)), batch_size=1)
        pl_module.log_dict(
            {"grad_norm": pl_module.grad_norm, "skipped_steps": float(pl_module.nonfinite.skipped_steps)}
        )

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks. Collective, like saving a checkpoint."""
        return {"names": self.names, "sums": all_gather_objects([] if self.sums is None else self.sums.tolist())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """This rank's sums. With another number of ranks, rank 0 gets the sums of all stored ranks."""
        by_rank, rank = state_dict["sums"], get_rank()
        if len(by_rank) != get_world_size():
            nonempty = [sums for sums in by_rank if sums]
            by_rank = [[sum(column) for column in zip(*nonempty, strict=True)]] if nonempty else [[]]
        # checkpoints of commit ae7d5c0 and earlier have the old name
        self.names = [name.replace("trivial_loss", "constant_baseline_loss") for name in state_dict["names"]]
        own_sums = by_rank[rank] if rank < len(by_rank) else []
        self.sums = torch.tensor(own_sums, dtype=torch.float64) if own_sums else None


class StopOnSignal(Callback):
    """After a stop signal, finish the optimizer step, save ``last.ckpt`` and exit with `INTERRUPTED_EXIT_CODE`.

    `resume` continues with the next batch of the epoch. `EpochCheckpoints` handles a signal in the last step of an
    epoch.
    """

    def __init__(self, stop_signal: StopSignal, path: Path, accumulate_grad_batches: int) -> None:
        self.stop_signal, self.path, self.accumulate_grad_batches = stop_signal, path, accumulate_grad_batches

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Save and exit if any rank has received a signal. Collective."""
        batches_done = training_position(trainer)[1]
        is_step_end = batches_done > 0 and batches_done % self.accumulate_grad_batches == 0
        if not is_step_end or not should_stop(trainer, self.stop_signal):
            return
        trainer.save_checkpoint(self.path, weights_only=False)
        _rank_zero_info(trainer, stop_message(self.path))
        raise SystemExit(INTERRUPTED_EXIT_CODE)


def should_stop(trainer: pl.Trainer, stop_signal: StopSignal) -> bool:
    """Whether any rank has received a stop signal; the same value on every rank. Collective."""
    return bool(trainer.strategy.reduce_boolean_decision(stop_signal() is not None, all=False))


def _rank_zero_info(trainer: pl.Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text, file=sys.stderr, flush=True)
