"""What Lightning is taught for this project: file format, epochs, stopping, exact means."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
from pytorch_lightning.callbacks import Callback, Checkpoint

from mmdistill.checkpoint import load_torch, prune, save_torch
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.retention import best_checkpoint, link_or_copy
from mmdistill.distill.module import position
from mmdistill.distill.validation import METRIC
from mmdistill.distributed.collectives import all_gather_objects, run_on_all_ranks
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from mmdistill.randomness import seed_step

LAST = "last.ckpt"


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


class EpochCheckpoints(Checkpoint):
    """``epoch=XX-train_loss=X.XXXX.ckpt`` every `save_ckpt_freq` epochs and at the end, and ``last.ckpt``.

    ``last.ckpt`` is the newest of them under a second name, so it costs no second write. The losses and validations of
    all that were saved travel with each checkpoint: a run that is resumed in another folder still knows which is the
    best.

    Args:
        directory: the folder of checkpoints.
        save_ckpt_freq: epochs between files.
        keep_last, save_top_k: see `checkpoint.prune`.
        monitor: what the best go by: ``train_loss`` or ``val_top1_action``.
        source: the checkpoint that the run resumed from, which is never removed.
        stop_signal: a signal in an epoch's last step ends the run here.
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
        stop_signal: Callable[[], int | None],
    ) -> None:
        self.directory, self.every = directory, save_ckpt_freq
        self.keep_last, self.save_top_k, self.source = keep_last, save_top_k, source
        self.stop_signal = stop_signal
        self.monitor = monitor
        self.losses: dict[str, float] = {}  # absolute path -> loss
        self.validations: dict[str, float] = {}  # absolute path -> val_top1_action, of validated epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save where it is time to; the last epoch always."""
        epoch, loss = trainer.current_epoch, float(trainer.callback_metrics.get("train_loss", float("nan")))
        ended = epoch + 1 == trainer.max_epochs
        stop = not ended and asked_to_stop(trainer, self.stop_signal)
        if ended or (epoch + 1) % self.every == 0:
            path = (self.directory / f"epoch={epoch:02d}-train_loss={loss:.4f}.ckpt").absolute()
            self.losses[str(path)] = loss
            if METRIC in trainer.callback_metrics and (epoch + 1) % trainer.check_val_every_n_epoch == 0:
                self.validations[str(path)] = float(trainer.callback_metrics[METRIC])
            trainer.save_checkpoint(path)
            run_on_all_ranks(lambda: self._tidy(path) if trainer.is_global_zero else None, error_class=CheckpointError)
        elif stop:
            trainer.save_checkpoint(self.directory / LAST)
        if stop:  # Lightning logs the epoch's row before it leaves
            trainer.should_stop = True
            _say(trainer, f"stopped by a signal; whole checkpoint written: {self.directory / LAST}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Name the best one."""
        best = best_checkpoint(self._ranks())
        if best is not None:
            values = self.losses if self.monitor == "train_loss" else self.validations
            _say(trainer, f"best checkpoint: {best} ({self.monitor} {values[str(best)]:.4f})")

    def _ranks(self) -> dict[str, float]:
        """By path; the lowest is the best."""
        return self.losses if self.monitor == "train_loss" else {p: -v for p, v in self.validations.items()}

    def state_dict(self) -> dict[str, Any]:
        """The losses and validations of all checkpoints of this training."""
        return {"losses": dict(self.losses), "validations": dict(self.validations)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the lists of the run that is continued."""
        self.losses = {str(k): float(v) for k, v in state_dict["losses"].items()}
        self.validations = {str(k): float(v) for k, v in state_dict.get("validations", {}).items()}

    def _tidy(self, path: Path) -> None:
        link_or_copy(path, self.directory / LAST)
        prune(
            self.directory,
            keep_last=self.keep_last,
            save_top_k=self.save_top_k,
            protect=[self.source] if self.source else [],
            external_losses=self.losses,
            scores=None if self.monitor == "train_loss" else self._ranks(),
        )


class SetEpochCallback(Callback):
    """Tells the sampler which epoch begins (the first one of a run is set when its loader is made), and seeds steps.

    Anything random in a step depends on (seed, epoch, batch, rank) alone, so a resumed run needs no generator state.
    """

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The sampler stands where the run starts."""
        pl_module.go_on(self.sampler.epoch, self.sampler.start_batch)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Before the epoch's iterator is made; skipped by Lightning where a run resumes inside an epoch."""
        self.sampler.set_state(trainer.current_epoch, 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Seed the step."""
        seed_step(self.seed, trainer.current_epoch, index, trainer.global_rank)


class EpochMeans(Callback):
    """Means of the step's ``values`` over an epoch's clips, all ranks together, also when the epoch was interrupted.

    Lightning's own means start anew at a resume. These sums (float64) are in the checkpoint, one list per rank, so
    that the resumed epoch's means equal the uninterrupted ones to the last bit.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: torch.Tensor | None = None  # of each value times the batch's clips; last: clips

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new epoch."""
        self.sums = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step; nothing waits for the device."""
        values = outputs["values"]
        if not values:  # the loss was not finite
            return
        self.names, clips = list(values), len(batch["index"])
        step = torch.stack([v.detach().double() for v in values.values()] + [torch.ones_like(outputs["loss"]).double()])
        step *= clips
        self.sums = step if self.sums is None else self.sums.to(step.device) + step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the means."""
        if self.sums is None:
            return
        total = trainer.strategy.reduce(self.sums.clone(), reduce_op="sum")
        means = (total[:-1] / total[-1]).float()
        self.log_dict(dict(zip(self.names, means, strict=True)), batch_size=1)
        self.log_dict({"grad_norm": pl_module.grad_norm, "skipped_steps": float(pl_module.nonfinite.skipped)})

    def state_dict(self) -> dict[str, Any]:
        """Every rank's sums. Collective, as saving is."""
        return {"names": self.names, "sums": all_gather_objects([] if self.sums is None else self.sums.tolist())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """This rank's sums; under another number of ranks, all of them on rank 0."""
        stored, ranks = state_dict["sums"], torch.distributed
        rank, world = (ranks.get_rank(), ranks.get_world_size()) if ranks.is_initialized() else (0, 1)
        if len(stored) != world:
            lists = [s for s in stored if s]
            stored = [[sum(column) for column in zip(*lists, strict=True)]] if lists else [[]]
        self.names = list(state_dict["names"])
        mine = stored[rank] if rank < len(stored) else []
        self.sums = torch.tensor(mine, dtype=torch.float64) if mine else None


class StopOnSignal(Callback):
    """After a signal, end at the end of the optimiser step: save ``last.ckpt``, leave with `INTERRUPTED_EXIT_CODE`.

    `resume` continues with the next batch of the epoch. A signal in an epoch's last step waits for the epoch's end,
    where `EpochCheckpoints` sees it.
    """

    def __init__(self, stop_signal: Callable[[], int | None], path: Path, accumulate: int) -> None:
        self.stop_signal, self.path, self.accumulate = stop_signal, path, accumulate

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """All ranks agree on the stop."""
        done = position(trainer)[1]
        if done == 0 or done % self.accumulate or not asked_to_stop(trainer, self.stop_signal):
            return
        trainer.save_checkpoint(self.path)
        how = f"continue with resume={self.path}, or with resume=auto in the same hydra.run.dir"
        _say(trainer, f"stopped by a signal; whole checkpoint written: {self.path}\n{how}")
        raise SystemExit(INTERRUPTED_EXIT_CODE)


def asked_to_stop(trainer: pl.Trainer, stop_signal: Callable[[], int | None]) -> bool:
    """Whether any rank got a signal to stop; the same answer on every rank."""
    return bool(trainer.strategy.reduce_boolean_decision(stop_signal() is not None, all=False))


def _say(trainer: pl.Trainer, text: str) -> None:
    if trainer.is_global_zero:
        print(text, file=sys.stderr, flush=True)
