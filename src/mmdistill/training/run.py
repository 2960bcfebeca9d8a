"""What both trainings do around their steps: process, folder and lock, position, log, stop signals, retention."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.profiler import profile

from mmdistill import __version__
from mmdistill.checkpoint import prune
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.lock import run_lock
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint
from mmdistill.checkpoint.retention import find_resume, remove_interrupted_saves
from mmdistill.checkpoint.write import warn_if_unsynced
from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, as_names, to_plain
from mmdistill.distributed.collectives import all_reduce_any, all_reduce_sum, broadcast_run_dir, run_on_all_ranks
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE, Process, start_process
from mmdistill.errors import format_count
from mmdistill.files import remove_temporary_files
from mmdistill.models.videomae import EncoderConfig
from mmdistill.training.compatibility import check_compatible, check_weight_compat
from mmdistill.training.data_report import DataReport
from mmdistill.training.loggers import ResumePoint
from mmdistill.training.matrix_rate import DTYPES, measure_matrix_rate
from mmdistill.training.nonfinite import NonFiniteGuard
from mmdistill.training.optim import Optimization, schedule_warnings
from mmdistill.training.run_logger import RunLog, ThroughputMeter
from mmdistill.training.run_metadata import update_record
from mmdistill.training.signals import StopSignal, stop_message, stop_signals
from mmdistill.training.state import TrainingState
from mmdistill.training.step_trace import NUM_WARMUP_STEPS, start_trace
from mmdistill.training.train_data import TrainData

Config = PretrainConfig | DistillConfig


@dataclass(frozen=True)
class Run:
    """One start of a training.

    Attributes:
        directory: the run's folder, absolute; the same on all ranks.
        process: rank and device.
        precision: ``32``, ``bf16`` or ``16``.
        resumed: the checkpoint that the run resumes from.
    """

    directory: Path
    process: Process
    precision: str
    resumed: Checkpoint | None

    @property
    def source(self) -> Path | None:
        """Path of the checkpoint that the run resumes from."""
        return self.resumed.path if self.resumed else None

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.directory / "checkpoints"


@contextmanager
def open_run(config: Config, run_dir: Path) -> Iterator[Run]:
    """Start this process, lock the run's folder, and find the checkpoint to resume from. Collective.

    Raises:
        ConfigError: the device does not support the precision.
        CheckpointError: another job holds the lock, or see `find_resume`.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    precision = resolve_precision(config.precision, process.device)  # raises before anything is created
    run_dir = broadcast_run_dir(run_dir)
    with run_lock(run_dir / "checkpoints"):
        if process.is_main:
            warn_if_unsynced(run_dir / "checkpoints")
            _remove_left_files(run_dir)
        source = find_resume(config.resume, run_dir / "checkpoints")
        resumed = open_checkpoint(source, verify=False) if source else None  # verified when its tensors are loaded
        yield Run(run_dir, process, precision, resumed)


def _remove_left_files(run_dir: Path) -> None:
    """Remove what a start that was killed has left in the folder of the run."""
    remove_interrupted_saves(run_dir / "checkpoints")
    for folder in (run_dir, run_dir / "images", *run_dir.glob("teacher_features/*")):
        remove_temporary_files(folder)


def prune_checkpoints(
    config: Config, run: Run, state: TrainingState, scores: Mapping[str, float] | None = None
) -> None:
    """Remove old checkpoints (`keep_last`, `save_top_k`), see `prune`, and their losses in `state`. Collective.

    With ``resume=auto`` the checkpoint that the run resumed from is one of them.
    """

    def prune_on_main() -> list[str]:
        if not run.process.is_main:
            return []
        prune(
            run.checkpoints,
            keep_last=config.trainer.keep_last,
            save_top_k=config.trainer.save_top_k,
            protect=[run.source] if run.source and config.resume != "auto" else [],
            external_losses=state.losses,
            scores=scores,
        )
        return [path for path in state.losses if not Path(path).exists()]

    state.forget_checkpoints(run_on_all_ranks(prune_on_main, error_class=CheckpointError)[0])


def complete_message(config: Config) -> str:
    """The log line of a run that resumes from a checkpoint of the last epoch."""
    return f"training is already complete: trainer.epochs={config.trainer.epochs}"


@contextmanager
def start_training(
    config: Config, run: Run, data: TrainData, *, title: str, weight_compat: Mapping[str, Any] | None = None
) -> Iterator["Training"]:
    """The `Training` of a run. While it is open, stop signals are recorded. `weight_compat`: see `check_compatible`."""
    total_steps = config.trainer.epochs * data.steps_per_epoch
    _check_profile(config.trainer.profile, total_steps)
    with (
        RunLog(run.directory, title=title, total_steps=total_steps, enabled=run.process.is_main) as log,
        stop_signals(config.stop_signals) as stop_signal,
    ):
        training = Training(config, run, data, log, stop_signal, weight_compat or {})
        try:
            yield training
        finally:
            training.stop_trace()


def _check_profile(num_steps: int, total_steps: int) -> None:
    """Raise `ConfigError` if a training of `total_steps` ends before a trace of `num_steps` steps is complete."""
    if num_steps and NUM_WARMUP_STEPS + num_steps > total_steps:
        largest = total_steps - NUM_WARMUP_STEPS
        fix = f"use at most {largest}" if largest > 0 else "set trainer.profile=0"
        raise ConfigError(
            f"trainer.profile={num_steps} writes the trace of {format_count(num_steps, 'step')} after "
            f"{NUM_WARMUP_STEPS} other steps, and this training has {format_count(total_steps, 'step')}; {fix}"
        )


class Training:
    """The parts of a training that do not depend on its network.

    Attributes:
        state: position and sums, saved in each checkpoint.
        guard: policy for non-finite values.
        optimization: hyperparameters of the optimizer and its schedule.
        throughput: of the current epoch.
        extra_metrics: further metrics of the current epoch; `log_epoch` sends and removes them.
        flops_per_clip: FLOPs of a step of the current epoch per clip of `data`, set by the trainer; 0: unknown.
    """

    def __init__(
        self,
        config: Config,
        run: Run,
        data: TrainData,
        log: RunLog,
        stop_signal: StopSignal,
        weight_compat: Mapping[str, Any],
    ) -> None:
        self.config, self.run, self.data, self.log = config, run, data, log
        self._stop_signal = stop_signal
        compat = {"resize": config.data_module.resize, **weight_compat}
        self._record = {"weight_compat": compat, "data_order": data.order}
        self._reports = [DataReport(data.dataset, run.directory, is_main=run.process.is_main)]
        if data.source is not None:
            self._reports.append(
                DataReport(data.source, run.directory, is_main=run.process.is_main, name="source_data")
            )
        self.state, self.throughput = TrainingState(), ThroughputMeter()
        self.extra_metrics: dict[str, float] = {}
        self.flops_per_clip, self._matrix_rate = 0, 0.0  # the rate is in FLOP/s, of all ranks together
        self._trace: profile | None = None
        trainer = config.trainer
        self.guard = NonFiniteGuard(
            trainer.on_nonfinite,
            trainer.max_skipped_steps,
            state=self.state,
            clip_id=data.clip_id,
            log=log.info,
        )
        self._clips_per_step = data.global_batch * data.accumulate_grad_batches
        self.optimization = Optimization.from_config(
            trainer, global_batch=self._clips_per_step, steps_per_epoch=data.steps_per_epoch
        )

    def log_start(self, title: str, module: nn.Module, more: str = "") -> None:
        """Log `title`, the settings and `more`, the data and the checkpoint to resume from; open the trackers."""
        config, run, info = self.config, self.run, self.log.info
        num_parameters = count_trainable(module)
        factors = f"trainer.lr {config.trainer.lr:g} x {self._clips_per_step} clips per step / 256"
        info(
            f"{title}: {self.data.summary}, {num_parameters:,} trainable parameters, learning rate "
            f"{self.optimization.lr:g} ({factors}), device {run.process.device}, precision {run.precision}{more}"
        )
        info("\n".join(report.start_summary() for report in self._reports))
        info("\n".join(schedule_warnings(config.trainer, run.resumed.stored_meta if run.resumed else {})))
        if run.source:
            info(f"resumed from {run.source} at epoch {self.state.epoch}, step {self.state.step}")
            info(complete_message(config) if self.state.epoch >= config.trainer.epochs else "")
        elif config.resume:
            info(f"resume=auto: {run.checkpoints} has no checkpoint; the training starts at epoch 0")
        resume = ResumePoint(run.source, self.state.step) if run.source else None
        self.log.open_trackers(as_names("logger", config.logger), to_plain(config), resume)
        if self.state.epoch < config.trainer.epochs:
            self._measure_matrix_rate()
            self._start_trace()

    def _measure_matrix_rate(self) -> None:
        """Measure, log and record the rate of matrix products, with the FLOPs per step. Collective."""
        process, precision, num_threads = self.run.process, self.run.precision, torch.get_num_threads()
        if not self.flops_per_clip:
            return
        rate = measure_matrix_rate(process.device, DTYPES[precision], num_threads)  # all ranks at the same time
        rates = torch.tensor(rate, dtype=torch.float64, device=process.device)
        self._matrix_rate = float(all_reduce_sum([rates])[0])
        flops_per_step = self.flops_per_clip * self._clips_per_step
        where = [str(DTYPES[precision]).removeprefix("torch.")]
        where += [format_count(num_threads, "thread")] if process.device.type == "cpu" else []
        where += [f"sum of {process.world_size} processes"] if process.world_size > 1 else []
        self.log.info(
            f"{_format_giga(flops_per_step)} GFLOP per step; matrix products reach {_format_giga(self._matrix_rate)} "
            f"GFLOP/s ({', '.join(where)})"
        )
        if process.is_main:
            values = {"flops_per_step": flops_per_step, "matrix_flops_per_s": round(self._matrix_rate)}
            update_record(self.run.directory, values)

    def _start_trace(self) -> None:
        """Start the trace of `trainer.profile` on rank 0. A run that resumes may have too few steps left."""
        num_steps, step = self.config.trainer.profile, self.data.schedule_step(self.state)
        if not num_steps or not self.run.process.is_main:
            return
        num_left = self.config.trainer.epochs * self.data.steps_per_epoch - step
        if NUM_WARMUP_STEPS + num_steps > num_left:
            left = format_count(num_left, "step")
            self.log.info(f"trainer.profile={num_steps} writes no trace: only {left} of this training are left")
            return
        directory, device = self.run.directory, self.run.process.device
        self._trace = start_trace(directory, device, num_steps=num_steps, steps_done=step, info=self.log.info)

    def end_batch(self, num_clips: int) -> None:
        """Count the clips of a batch over all ranks, and end the step of the trace after the last batch of a step."""
        self.throughput.add_clips(num_clips)
        is_step_end = self.state.batch % self.data.accumulate_grad_batches == 0
        if self._trace is not None and (is_step_end or self.state.batch >= self.data.batches_per_epoch):
            with self.throughput.pause():
                self._trace.step()

    def stop_trace(self) -> None:
        """Stop the trace of `trainer.profile`, if there is one."""
        if self._trace is not None:
            self._trace.stop()
            self._trace = None

    def log_step(self, note: str = "") -> None:
        """Show the position in the training, `note` and, from the second step on, the throughput."""
        rates = ""
        if self.throughput.num_steps > 1:  # the first step includes the start of the data loader
            speed = self.throughput.metrics
            rates = f"{speed['clips_per_s']:.1f} clips/s data wait {speed['data_wait_percent']:.0f} %"
        text = " ".join(filter(None, (f"epoch {self.state.epoch}", note, rates)))
        self.log.step(self.data.schedule_step(self.state), text)

    def log_epoch(self, means: Mapping[str, float], text: str, *, lr: float, loss_scale: float | None) -> None:
        """Send the metrics of the epoch to the trackers, and log `text`."""
        state, speed = self.state, self.throughput.metrics
        metrics = {"epoch": state.epoch, **means, "lr": lr, **speed}
        mfu_text = ""
        if self._matrix_rate:
            mfu_percent = 100 * speed["clips_per_s"] * self.flops_per_clip / self._matrix_rate
            gflop_per_step = self.flops_per_clip * self._clips_per_step / 1e9
            metrics |= {"gflop_per_step": gflop_per_step, "mfu_percent": mfu_percent}
            mfu_text = f", MFU {mfu_percent:.0f} %"
        metrics |= {"grad_norm": self.guard.grad_norm, "skipped_steps": state.skipped_steps, **self.extra_metrics}
        self.extra_metrics = {}
        if loss_scale is not None:
            metrics |= {"loss_scale": loss_scale, "overflow_steps": state.overflow_steps}
        self.log.log_metrics(state.step, metrics)
        rates = f"{speed['clips_per_s']:.1f} clips/s{mfu_text}, data wait {speed['data_wait_percent']:.0f} %"
        self.log.info(f"epoch {state.epoch}: {text}, {rates}")

    def state_dict(self) -> dict[str, Any]:
        """The state, and the settings that a resumed run must share."""
        order = {**self._record["data_order"], "batches_per_epoch": self.data.batches_per_epoch}
        return {**self.state.state_dict(), **self._record, "data_order": order}

    def check_weight_compat(self, stored: Mapping[str, Any]) -> None:
        """Raise `ConfigError` if the weights of a checkpoint with the state `stored` depend on other settings."""
        check_weight_compat(stored, self._record, self.run.source)

    def load_state_dict(self, stored: Mapping[str, Any]) -> None:
        """Continue at the stored position. Raises `ConfigError`, see `check_compatible`."""
        self.state.load_state_dict(stored)
        if self.state.batch >= stored["data_order"].get("batches_per_epoch", self.data.batches_per_epoch):
            self.state.start_epoch(self.state.epoch + 1)
        check_compatible(stored, self._record, self.state, self.run.source)
        if "step" not in stored:
            self.state.step = self.data.schedule_step(self.state)
        self.data.sampler.set_state(self.state.epoch, self.state.batch)

    def meta(self, kind: str, encoders: Mapping[str, EncoderConfig], statistics: Mapping[str, Any]) -> dict[str, Any]:
        """Metadata that are stored with the weights. ``batch``: batches done in the epoch, None at its end.

        `kind` is ``pretrain`` or ``distill``, `encoders` are by component, `statistics` by modality.
        """
        state = self.state
        return {
            "mmdistill_version": __version__,
            "kind": kind,
            "encoders": {name: to_plain(config) for name, config in encoders.items()},
            "statistics": dict(statistics),
            "config": to_plain(self.config),
            "batch": state.batch if state.batch < self.data.batches_per_epoch else None,
            **{name: getattr(state, name) for name in ("epoch", "step", "skipped_steps", "overflow_steps")},
        }

    def finish_save(self, scores: Mapping[str, float] | None = None) -> None:
        """After a save, write the data report and remove old checkpoints (`keep_last`, `save_top_k`). Collective.

        `scores` are by path, the lowest is the best; None: the losses.
        """
        prune_checkpoints(self.config, self.run, self.state, scores)
        for report in self._reports:
            report.write()

    def should_stop(self) -> bool:
        """Whether any rank has received a stop signal. Collective."""
        return all_reduce_any(self._stop_signal() is not None, self.run.process.device)

    def stop(self, checkpoint: Path) -> NoReturn:
        """Exit with `INTERRUPTED_EXIT_CODE` after `checkpoint` was written. Collective."""
        self._log_missing_data()
        self.log.info(stop_message(checkpoint, self.run.directory))
        raise SystemExit(INTERRUPTED_EXIT_CODE)

    def _log_missing_data(self) -> None:
        """Write the data reports, and log what was missing. Collective."""
        for report in self._reports:
            self.log.info(report.end_summary())

    def log_end(self, checkpoint: Path) -> None:
        """Log the end of a complete training with its last checkpoint. Collective."""
        self._log_missing_data()
        self.log.info(f"last checkpoint: {checkpoint}")


def _format_giga(value: float) -> str:
    """Three digits, or all digits before the point: ``0.0123``, ``12.3``, ``1,234``."""
    return f"{value / 1e9:.3g}" if value < 1e11 else f"{value / 1e9:,.0f}"


def count_trainable(module: nn.Module) -> int:
    """Number of trained values. ZeRO stage 3 keeps the size of a parameter in `ds_numel`: the parameter is empty."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters() if p.requires_grad)
