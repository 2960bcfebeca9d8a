"""What a distillation tells while it runs, through the same log as a pretraining: progress, lines, numbers."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmdistill.training.run_logger import RunLog


class Progress(Callback):
    """A bar or plain lines, a line per epoch with each teacher's loss beside its trivial predictor's, the trackers.

    Reads the epoch's means, so it stands behind the callback that makes them.

    Args:
        run_dir: the run's folder.
        trackers: names, see `mmdistill.training.loggers`.
        config: the resolved config, for trackers that show it.
        source: the checkpoint that the run goes on from.
    """

    def __init__(
        self, run_dir: Path, trackers: Sequence[str], config: Mapping[str, Any], source: Path | None = None
    ) -> None:
        self._run_dir, self._trackers, self._config, self._source = run_dir, trackers, config, source
        self._log: RunLog | None = None
        self._restart()

    def _restart(self) -> None:
        self._began = self._asked = time.monotonic()
        self._clips, self._waited = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the log. A run that resumes inside an epoch sees no start of it."""
        self._log = RunLog(
            self._run_dir,
            total_steps=(trainer.max_epochs or 0) * int(trainer.num_training_batches),
            title="distil",
            enabled=trainer.is_global_zero,
            trackers=self._trackers,
            config=self._config,
            source=self._source,
        )
        self._log.__enter__()
        if self._source:
            self._log.continues(self._source, trainer.global_step)
        self._restart()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._restart()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """The batch is here: what passed since the last one was waiting."""
        self._waited += time.monotonic() - self._asked

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step."""
        assert self._log is not None
        self._clips += len(batch["index"]) * trainer.world_size
        self._asked = time.monotonic()
        done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        rate, wait = self._rates()
        self._log.step(done, f"epoch {trainer.current_epoch} {rate:.0f} clips/s data wait {wait:.0f} %")

    def _rates(self) -> tuple[float, float]:
        """(clips per second, share of the time that was waited for data in %), of this epoch."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        return self._clips / seconds, 100 * self._waited / seconds

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The epoch's line and numbers."""
        assert self._log is not None
        means = {name: float(value) for name, value in trainer.callback_metrics.items()}
        rate, wait = self._rates()
        values = {
            "epoch": trainer.current_epoch,
            **means,
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "clips_per_s": rate,
            "data_wait_percent": wait,
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            values |= {"loss_scale": float(scaler.get_scale()), "overflow_steps": pl_module.overflow_steps}
        self._log.scalars(trainer.global_step, values)
        parts = ", ".join(
            f"{name.removeprefix('train_loss_')} {value:.4f} (trivial {means[name.replace('train', 'trivial', 1)]:.4f})"
            for name, value in means.items()
            if name.startswith("train_loss_")
        )
        loss = means.get("train_loss", float("nan"))
        line = f"epoch {trainer.current_epoch}: loss {loss:.4f}: {parts}, {rate:.1f} clips/s, data wait {wait:.0f} %"
        self._log.say(line)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the log."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the log; Lightning tears nothing down then."""
        self._close()

    def _close(self) -> None:
        if self._log is not None:
            self._log.__exit__(None, None, None)
            self._log = None
