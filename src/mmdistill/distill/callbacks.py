"""Lightning callbacks: skipped steps and average, position and log, checkpoint files and stop signals."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch.profiler import record_function

from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.references import labeled_sources_entry
from mmdistill.checkpoint.retention import best_checkpoint, link_or_copy
from mmdistill.data.dataloader import ClipLoader
from mmdistill.distill.ledger import Ledger
from mmdistill.distributed.collectives import run_on_all_ranks
from mmdistill.models.videomae import EncoderConfig
from mmdistill.randomness import seed_step
from mmdistill.training.monitoring import METRIC
from mmdistill.training.nonfinite import grad_norm, skip_optimizer_step
from mmdistill.training.optim import StepSchedule
from mmdistill.training.run import Training
from mmdistill.training.run_logger import baseline_ratio
from mmdistill.training.state import TrainingState

LAST = "last.ckpt"


class ResumableLoader(ClipLoader):
    """A loader with the two methods that Lightning requires for a resume inside an epoch.

    They do nothing, because `Training.load_state_dict` sets the sampler's position.
    """

    def state_dict(self) -> dict[str, Any]:
        """An empty dict."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Ignored."""


def loss_scale(trainer: pl.Trainer) -> float | None:
    """The dynamic loss scale of precision=16."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


class StepCallback(Callback):
    """Skip an optimizer step whose loss or gradient is not finite; update the student's average after the others.

    It comes before `TrainingCallback`, which counts the step. It also names the backward pass and the step in traces.
    """

    def __init__(self, training: Training) -> None:
        self.guard = training.guard
        self._is_step_end = False
        self._skipped_before = 0  # steps that the engine had skipped before this one
        self._step_context = ExitStack()  # entered during the optimizer step
        self._backward = record_function("backward")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Any) -> None:
        """Start the range of the backward pass."""
        self._backward.__enter__()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """End the range of the backward pass."""
        self._backward.__exit__(None, None, None)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Check the gradient before it is clipped. Raises `NonFiniteError` if the policy does not allow to skip."""
        self._is_step_end = True
        self._step_context.enter_context(record_function("optimizer"))
        strategy: Any = trainer.strategy
        if _is_zero(strategy):
            self._skipped_before = strategy.deepspeed_engine.skipped_steps
            must_skip = self.guard.before_step()
        else:
            must_skip = self.guard.before_step(grad_norm(list(pl_module.parameters())), loss_scale(trainer))
        if must_skip and isinstance(strategy, DeepSpeedStrategy):
            self._step_context.enter_context(skip_optimizer_step(optimizer))
        elif must_skip:  # this hook runs inside AdamW's step, which ignores parameters without a gradient
            for parameter in pl_module.parameters():
                parameter.grad = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """After an optimizer step, handle a step that ZeRO has skipped, and update the average."""
        if not self._is_step_end:
            return
        self._is_step_end = False
        self._step_context.close()
        strategy: Any = trainer.strategy
        if _is_zero(strategy):
            engine = strategy.deepspeed_engine
            was_skipped = engine.skipped_steps > self._skipped_before
            self.guard.after_step(engine.get_global_grad_norm(), was_skipped=was_skipped)
        if not self.guard.was_skipped:
            pl_module.update_average()


def _is_zero(strategy: Any) -> bool:
    """Whether only the optimizer knows the gradient: ZeRO keeps it in buckets, and computes its norm in the step."""
    return isinstance(strategy, DeepSpeedStrategy) and strategy.stage > 0  # type: ignore[attr-defined]


class TrainingCallback(Callback):
    """Position, seeds, learning rates and log of a training; `title` and `more` are in the first lines of the log.

    `weights` are the factors of the teachers' losses, see `format_losses`.

    All randomness in a step depends on (seed, epoch, batch, rank) alone, so a resumed run needs no generator state.
    """

    def __init__(
        self, training: Training, title: str, more: str = "", weights: Mapping[str, float] | None = None
    ) -> None:
        self.training, self.state, self.data = training, training.state, training.data
        self.title, self.more, self.weights = title, more, weights or {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the learning rates; `on_train_epoch_start` is not called if a run resumes inside an epoch."""
        self._schedule(trainer).restore(self.data.schedule_step(self.state))
        self._set_flops(pl_module)
        self.training.log_start(self.title, pl_module, self.more)
        self.training.throughput.restart()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called before the epoch's iterator is created."""
        self.state.start_epoch(trainer.current_epoch)
        self.data.sampler.set_state(trainer.current_epoch, 0)
        self._set_flops(pl_module)
        self.training.throughput.restart()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Seed the step."""
        self.training.throughput.end_wait()
        seed_step(self.training.config.seed, trainer.current_epoch, index, trainer.global_rank)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, and set the learning rates of the next step."""
        num_clips = len(batch["index"]) * trainer.world_size
        self.state.add_batch(outputs["values"], num_clips)
        self.state.step = trainer.global_step
        self._schedule(trainer).step_update(self.data.schedule_step(self.state))
        self.training.end_batch(num_clips)
        self.training.log_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's means, each teacher's loss with its constant baseline, also for Lightning's callbacks."""
        means, validation = self.state.means, trainer.callback_metrics.get(METRIC)
        pl_module.log_dict(means, sync_dist=True)
        metrics = means if validation is None else {**means, METRIC: float(validation)}
        lr = self._schedule(trainer).lr
        text = format_losses(means, self.weights)
        self.training.log_epoch(metrics, text, lr=lr, loss_scale=loss_scale(trainer))

    def _set_flops(self, pl_module: Any) -> None:
        self.training.flops_per_clip = pl_module.flops_per_clip(self.data.dataset.mask.num_visible)

    def _schedule(self, trainer: pl.Trainer) -> StepSchedule:
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        return schedule  # type: ignore[no-any-return]


def format_losses(means: Mapping[str, float], weights: Mapping[str, float]) -> str:
    """The total loss, and each teacher's loss with its ratio to the constant baseline, from `TrainingState.means`.

    A loss with a weight other than 1 is shown with it, ``flow 2 x 1.0644``: the total is the weighted sum. A target
    whose baseline is 0 is constant and has no ratio.
    """
    parts: list[str] = []
    for name, loss in means.items():
        if name.startswith("train_loss_"):
            teacher = name.removeprefix("train_loss_")
            ratio = baseline_ratio(loss, means[f"constant_baseline_loss_{teacher}"])
            label = "ratio" if any("ratio" in part for part in parts) else "ratio to constant baseline"
            shown = f"{label} {f'{ratio:.2g}' if ratio < 10 else f'{ratio:.0f}'}"
            factor = "" if weights.get(teacher, 1.0) == 1 else f"{weights[teacher]:g} x "
            parts.append(f"{teacher} {factor}{loss:.4f} ({'constant target' if math.isnan(ratio) else shown})")
    total = f"loss {means.get('train_loss', math.nan):.4f}"
    return f"{total}: {', '.join(parts)}" if parts else total


def pruning_scores(state: TrainingState, monitor: str) -> dict[str, float] | None:
    """Score of each checkpoint by path, the lowest is the best; None: the losses."""
    return None if monitor == "train_loss" else {path: -value for path, value in state.validations.items()}


class EpochCheckpoints(Checkpoint):
    """``epoch=XX-train_loss=X.XXXX.ckpt`` every `save_ckpt_freq` epochs and at the end, and ``last.ckpt``.

    ``last.ckpt`` is a hard link to the newest of them (a copy where the disk has no links), or the checkpoint that was
    written after a stop signal. Each checkpoint stores the state of `training`. Lightning calls this class after all
    other callbacks.

    Args:
        training: the training.
        encoders: architecture of each component.
        statistics: of each modality.
        sources: path and sha256 of each teacher by component.
        monitor: metric that decides the best: ``train_loss`` or ``val_top1_action``.
        ledger: of the teachers; None: no ledger is stored.
        student_sources: labeled sources of the student's initial weights, see `labeled_sources`.
    """

    def __init__(
        self,
        training: Training,
        *,
        encoders: Mapping[str, EncoderConfig],
        statistics: Mapping[str, Any],
        sources: Mapping[str, Any],
        monitor: str,
        ledger: Ledger | None = None,
        student_sources: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.training, self.state = training, training.state
        self.encoders, self.statistics, self.sources = encoders, statistics, sources
        self.monitor, self.ledger, self.student_sources = monitor, ledger, student_sources
        self.last_path = training.run.checkpoints / LAST

    def state_dict(self) -> dict[str, Any]:
        """See `Training.state_dict`."""
        return self.training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `Training.load_state_dict`."""
        self.training.load_state_dict(state_dict)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the metadata. ``loss`` is None inside an epoch."""
        meta = self.training.meta("distill", self.encoders, self.statistics)
        loss = None if meta["batch"] else self.state.means.get("train_loss")
        meta |= {"decoder": None, "teachers": dict(self.sources), "loss": loss}
        meta |= labeled_sources_entry(self.student_sources)
        if self.ledger is not None and self.ledger.current is not None:
            meta["ledger"] = self.ledger.current
        checkpoint["mmdistill"] = meta

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Inside an epoch, save and exit after a stop signal, when the optimizer step is complete. Collective."""
        data, batch = self.training.data, self.state.batch
        is_step_end = batch < data.batches_per_epoch and batch % data.accumulate_grad_batches == 0
        if is_step_end and self.training.should_stop():
            trainer.save_checkpoint(self.last_path, weights_only=False)
            self.training.stop(self.last_path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save every `save_ckpt_freq` epochs, at the last epoch, and after a stop signal. Collective."""
        config, epoch = self.training.config.trainer, self.state.epoch
        is_last_epoch = epoch + 1 == trainer.max_epochs
        must_stop = not is_last_epoch and self.training.should_stop()
        if is_last_epoch or (epoch + 1) % config.save_ckpt_freq == 0:
            loss = self.state.means.get("train_loss", math.nan)
            path = self.training.run.checkpoints / f"epoch={epoch:02d}-train_loss={loss:.4f}.ckpt"
            self.state.losses[str(path)] = loss
            if METRIC in trainer.callback_metrics and (epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
                self.state.validations[str(path)] = float(trainer.callback_metrics[METRIC])
            trainer.save_checkpoint(path, weights_only=False)
            run_on_all_ranks(
                lambda: link_or_copy(path, self.last_path) if trainer.is_global_zero else None,
                error_class=CheckpointError,
            )
            self.training.finish_save(pruning_scores(self.state, self.monitor))
        elif must_stop:
            trainer.save_checkpoint(self.last_path, weights_only=False)
        if must_stop:  # unlike an exit here, this lets Lightning finish the epoch
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the best checkpoint."""
        best = best_checkpoint(self._scores)
        if best is not None:
            values = self.state.losses if self.monitor == "train_loss" else self.state.validations
            self.training.log.info(f"best checkpoint: {best} ({self.monitor} {values[str(best)]:.4f})")

    @property
    def _scores(self) -> dict[str, float]:
        """Score of each checkpoint by path; the lowest is the best."""
        if self.monitor == "train_loss":
            return self.state.losses
        return pruning_scores(self.state, self.monitor) or {}
