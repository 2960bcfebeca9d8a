"""Log a distillation with the same run log as a pretraining: progress bar, log lines, metrics."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mmdistill.training.loggers import ResumePoint
from mmdistill.training.run_logger import RunLog, baseline_ratio


class LoggingCallback(Callback):
    """Show the progress; log a line and metrics per epoch, with each teacher's loss and its constant baseline.

    It must come after `EpochMeans` in the list of callbacks, because it reads these means.

    Args:
        run_dir: the run's folder.
        trackers: names, see `mmdistill.training.loggers`.
        config: the resolved config, for the trackers.
        source: the checkpoint that the run resumes from.
    """

    def __init__(
        self, run_dir: Path, trackers: Sequence[str], config: Mapping[str, Any], source: Path | None = None
    ) -> None:
        self._run_dir, self._trackers, self._config, self._source = run_dir, trackers, config, source
        self._log: RunLog | None = None
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._start = self._wait_start = time.monotonic()
        self._num_clips, self._wait_s = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the log and start the clock: `on_train_epoch_start` is not called if a run resumes inside an epoch."""
        self._log = RunLog(
            self._run_dir,
            total_steps=(trainer.max_epochs or 0) * int(trainer.num_training_batches),
            title="distill",
            enabled=trainer.is_global_zero,
            trackers=self._trackers,
            config=self._config,
            resume=ResumePoint(self._source, trainer.global_step) if self._source else None,
        )
        self._log.__enter__()
        self._restart_clock()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self._restart_clock()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        """Add the time since the end of the last step to the data wait."""
        self._wait_s += time.monotonic() - self._wait_start

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the progress bar."""
        assert self._log is not None
        self._num_clips += len(batch["index"]) * trainer.world_size
        self._wait_start = time.monotonic()
        done = trainer.current_epoch * int(trainer.num_training_batches) + batch_idx + 1
        clips_per_s, data_wait = self._throughput()
        self._log.step(done, f"epoch {trainer.current_epoch} {clips_per_s:.0f} clips/s data wait {data_wait:.0f} %")

    def _throughput(self) -> tuple[float, float]:
        """(clips per second, percentage of the time spent waiting for data) of the current epoch."""
        elapsed_s = max(time.monotonic() - self._start, 1e-9)
        return self._num_clips / elapsed_s, 100 * self._wait_s / elapsed_s

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Log the epoch's metrics and line."""
        assert self._log is not None
        means = {name: float(value) for name, value in trainer.callback_metrics.items()}
        clips_per_s, data_wait = self._throughput()
        metrics = {
            "epoch": trainer.current_epoch,
            **means,
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "clips_per_s": clips_per_s,
            "data_wait_percent": data_wait,
        }
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            metrics |= {"loss_scale": float(scaler.get_scale()), "overflow_steps": pl_module.overflow_steps}
        self._log.log_metrics(trainer.global_step, metrics)
        throughput = f"{clips_per_s:.1f} clips/s, data wait {data_wait:.0f} %"
        self._log.info(f"epoch {trainer.current_epoch}: {format_losses(means)}, {throughput}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the log."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the log: Lightning does not call `teardown` after an exception."""
        self._close()

    def _close(self) -> None:
        if self._log is not None:
            self._log.__exit__(None, None, None)
            self._log = None


def format_losses(means: Mapping[str, float]) -> str:
    """The total loss, and each teacher's loss with its ratio to the constant baseline.

    Args:
        means: epoch means ``train_loss``, ``train_loss_NAME`` and ``constant_baseline_loss_NAME``.
    """
    parts: list[str] = []
    for name, loss in means.items():
        if name.startswith("train_loss_"):
            teacher = name.removeprefix("train_loss_")
            ratio = baseline_ratio(loss, means[f"constant_baseline_loss_{teacher}"])
            label = "ratio to constant baseline" if not parts else "ratio"
            parts.append(f"{teacher} {loss:.4f} ({label} {f'{ratio:.2g}' if ratio < 10 else f'{ratio:.0f}'})")
    total = f"loss {means.get('train_loss', math.nan):.4f}"
    return f"{total}: {', '.join(parts)}" if parts else total
