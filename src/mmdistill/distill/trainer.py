"""One distillation run: load the teachers, create the module and the Trainer, fit."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from mmdistill import __version__
from mmdistill.builders import make_demo_data
from mmdistill.checkpoint.locate import locate
from mmdistill.checkpoint.lock import run_lock
from mmdistill.checkpoint.read import read_meta
from mmdistill.checkpoint.retention import find_resume
from mmdistill.config import DistillConfig, as_names, modality_specs, to_plain
from mmdistill.distill.callbacks import (
    LAST,
    EpochCheckpoints,
    EpochMeans,
    SetEpochCallback,
    StopOnSignal,
    VerifiedCheckpointIO,
)
from mmdistill.distill.datamodule import DistillData
from mmdistill.distill.logging_callback import LoggingCallback
from mmdistill.distill.module import MMDistill
from mmdistill.distill.strategy import strategy_kwargs
from mmdistill.distill.teacher_cache import TeacherCache, TeacherCacheCallback, cache_key
from mmdistill.distill.teachers import load_teachers
from mmdistill.distill.validation import validation_summary
from mmdistill.distributed.collectives import broadcast_run_dir
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE, Process, start_process
from mmdistill.errors import format_count
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec
from mmdistill.models.videomae import Encoder
from mmdistill.training.data_report import DataReport
from mmdistill.training.nonfinite import NonFiniteGuard
from mmdistill.training.optim import LearningRates, schedule_warnings
from mmdistill.training.run_logger import RunLog
from mmdistill.training.signals import StopSignal, stop_signals

_NOISE = ("GPU available", "TPU available", "💡 Tip", "`Trainer.fit` stopped")  # start of Lightning's log lines


def hide_lightning_noise() -> None:
    """Hide messages of Lightning that advertise products, repeat what this package logs, or need no action."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_is_no_noise)
    # the teachers are frozen; the deprecation is in Lightning itself
    for message in (r"Found \d+ module\(s\) in eval mode", r"`isinstance\(treespec, LeafSpec\)` is deprecated"):
        warnings.filterwarnings("ignore", message=message)


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE)


def distill(config: DistillConfig, run_dir: Path) -> Path:
    """Distill the teachers of `trainer.ckpt_path` into one RGB student.

    Args:
        config: the validated config.
        run_dir: the run's folder; checkpoints are ``checkpoints/epoch=XX-train_loss=X.XXXX.ckpt`` and
            ``checkpoints/last.ckpt``.

    Returns:
        The last checkpoint. A run that resumes from a checkpoint of the last epoch returns it at once.

    Raises:
        SystemExit: with `INTERRUPTED_EXIT_CODE` after a signal, when a complete checkpoint is written.
        NonFiniteError: a loss or gradient is not finite; names the step and the clips.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    resolve_precision(config.precision, process.device)  # raise before anything is created
    run_dir = broadcast_run_dir(run_dir)
    if process.is_main:
        make_demo_data(config.data_module)
    checkpoints = run_dir / "checkpoints"
    with run_lock(checkpoints):
        source = find_resume(config.resume, checkpoints)
        if source is None or not _is_complete(source, config.trainer.epochs):
            return _fit(config, run_dir, source, process)
        with RunLog(run_dir, total_steps=0, title="distill", enabled=process.is_main, trackers=()) as log:
            log.info(f"training is already complete: trainer.epochs={config.trainer.epochs}\nlast checkpoint: {source}")
        return source


def _is_complete(checkpoint: Path, epochs: int) -> bool:
    """Whether a checkpoint was written at the end of the last epoch."""
    meta = read_meta(locate(checkpoint))
    return meta.get("kind") == "distill" and not meta.get("batch") and int(meta.get("epoch", -1)) + 1 >= epochs


def _fit(config: DistillConfig, run_dir: Path, source: Path | None, process: Process) -> Path:
    """Train to the end; returns the last checkpoint."""
    specs = modality_specs(config.data_module)
    teachers, sources = load_teachers(config, specs, source)
    data = DistillData(config, tuple(teachers), process)
    module = _make_module(config, teachers, specs, sources, data, run_dir, process)
    report = DataReport(data.dataset, run_dir, is_main=process.is_main)
    with stop_signals(config.stop_signals) as stop_signal:
        trainer = _make_trainer(config, run_dir, data, source, stop_signal, process.device)
        if module.cache is not None:
            cache_callback = TeacherCacheCallback(
                module.cache, data.dataset, batch_size=config.batch_size, num_workers=config.num_workers
            )
            trainer.callbacks.insert(0, cache_callback)  # type: ignore[attr-defined]
        # Lightning's SIGTERM handler runs a broadcast inside the handler, possibly during another collective
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        lines = [_start_summary(config, teachers, module, data), report.start_summary()]
        if process.is_main:
            lines += schedule_warnings(config.trainer, read_meta(locate(source)) if source else None)
        if data.validation:
            lines.append(validation_summary(data.validation, config))
        if source:
            lines.append(f"resumed from {source}")
        elif config.resume:
            lines.append(f"resume=auto: no checkpoint in {run_dir / 'checkpoints'}; training starts from scratch")
        process.rank_zero_info("\n".join(lines))
        try:
            trainer.fit(module, datamodule=data, ckpt_path=str(source) if source else None, weights_only=True)
        except SystemExit:  # after a signal, on all ranks
            _report_end(report, process)
            raise
    _report_end(report, process)
    if trainer.should_stop:
        raise SystemExit(INTERRUPTED_EXIT_CODE)
    last_checkpoint = run_dir / "checkpoints" / LAST
    process.rank_zero_info(f"last checkpoint: {last_checkpoint}")
    return last_checkpoint


def _report_end(report: DataReport, process: Process) -> None:
    """Write the data report and print its summary if data was missing. Collective."""
    if summary := report.end_summary():
        process.rank_zero_info(summary)


def _start_summary(config: DistillConfig, teachers: dict[str, Encoder], module: MMDistill, data: DistillData) -> str:
    return (
        f"distill {', '.join(teachers)} into student_rgb: {format_count(len(data.dataset), 'clip')}, "
        f"{format_count(len(data.sampler), 'batch')} of {config.batch_size} per process and epoch "
        f"({format_count(data.sampler.num_dropped, 'clip')} skipped each epoch), base_lr "
        f"{config.trainer.lr:g} -> lr {module.rates.lr:g}"
    )


def _make_module(
    config: DistillConfig,
    teachers: dict[str, Encoder],
    specs: dict[str, ModalitySpec],
    sources: dict[str, Any],
    data: DistillData,
    run_dir: Path,
    process: Process,
) -> MMDistill:
    t = config.trainer
    precision = resolve_precision(config.precision, process.device)
    global_batch = config.batch_size * process.world_size * t.accumulate_grad_batches
    # rounded up: Lightning also steps at the end of an epoch, with fewer batches
    steps_per_epoch = math.ceil(len(data.sampler) / t.accumulate_grad_batches)
    module = MMDistill(
        teachers,
        specs,
        rates=LearningRates.scaled(t.lr, t.min_lr, t.warmup_lr, global_batch=global_batch),
        weight_decay=t.weight_decay,
        betas=(t.betas[0], t.betas[1]),
        warmup_steps=round(t.warmup_epochs * steps_per_epoch),
        total_steps=t.epochs * steps_per_epoch,
        meta=_make_meta(config, teachers, specs, sources),
        save_teachers=t.save_teachers,
        layer_decay=t.layer_decay,
        ema=t.ema,
        nonfinite=NonFiniteGuard(t.on_nonfinite, t.max_skipped_steps, process.rank_zero_info),
    )
    module.student.set_activation_checkpointing(t.activation_checkpointing)
    if config.compile:
        module.compile_encoders()
    if t.cache_teacher_epochs:
        data.dataset.cached_epochs = t.cache_teacher_epochs
        module.cache = TeacherCache(
            run_dir,
            num_draws=t.cache_teacher_epochs,
            num_clips=len(data.dataset),
            widths={m: e.config.dim for m, e in teachers.items()},
            key=cache_key(data.dataset, sources, specs, precision),
        )
    return module


def _make_meta(
    config: DistillConfig, teachers: dict[str, Encoder], specs: dict[str, ModalitySpec], sources: dict[str, Any]
) -> dict[str, Any]:
    students = ["student_rgb"] if config.trainer.ema is None else ["student_rgb", "student_ema_rgb"]
    student_config = to_plain(teachers[STUDENT_MODALITY].config)
    teacher_configs = {f"teacher_{m}": to_plain(e.config) for m, e in teachers.items()}
    return {
        "mmdistill_version": __version__,
        "kind": "distill",
        "encoders": {**dict.fromkeys(students, student_config), **teacher_configs},
        "decoder": None,
        "statistics": {m: specs[m].statistics for m in teachers},
        "config": to_plain(config),
        "teachers": sources,
    }


def _make_trainer(
    config: DistillConfig,
    run_dir: Path,
    data: DistillData,
    source: Path | None,
    stop_signal: StopSignal,
    device: torch.device,
) -> pl.Trainer:
    hide_lightning_noise()
    t = config.trainer
    checkpoints = run_dir / "checkpoints"
    callbacks: list[pl.Callback] = [
        SetEpochCallback(data.sampler, config.seed),
        EpochMeans(),  # before the callbacks that read the epoch's means
        LoggingCallback(run_dir, as_names("logger", config.logger), to_plain(config), source),
        StopOnSignal(stop_signal, checkpoints / LAST, t.accumulate_grad_batches),
        EpochCheckpoints(
            checkpoints,
            save_ckpt_freq=t.save_ckpt_freq,
            keep_last=t.keep_last,
            save_top_k=t.save_top_k,
            monitor=t.monitor,
            source=source,
            stop_signal=stop_signal,
        ),
    ]
    if data.validation:
        callbacks.append(data.validation)
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        **strategy_kwargs(config, resolve_precision(config.precision, device), plugins=[VerifiedCheckpointIO()]),
        max_epochs=t.epochs,
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.clip_grad,
        logger=False,  # `LoggingCallback` writes the run log
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=t.check_val_every_n_epoch or 1,
        limit_val_batches=1.0 if data.validation else 0,
    )
