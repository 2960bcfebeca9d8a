"""One distillation run: load the teachers, build the module and the Trainer, fit."""

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mmdistill import __version__
from mmdistill.builders import make_demo_data
from mmdistill.checkpoint.lock import run_lock
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
from mmdistill.distill.logging_callback import Progress
from mmdistill.distill.module import MMDistill
from mmdistill.distill.strategy import strategy_kwargs
from mmdistill.distill.teacher_cache import TeacherCache, TeacherCacheCallback, cache_key
from mmdistill.distill.teachers import load_teachers
from mmdistill.distill.validation import validation_line
from mmdistill.distributed.collectives import broadcast_run_dir
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE, Process, start_process
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec
from mmdistill.models.videomae import Encoder
from mmdistill.training.data_report import DataReport
from mmdistill.training.nonfinite import NonFiniteGuard
from mmdistill.training.optim import LearningRates
from mmdistill.training.signals import stop_signals


def distill(config: DistillConfig, run_dir: Path) -> Path:
    """Distil the teachers of `trainer.ckpt_path` into one RGB student.

    Args:
        config: the validated config.
        run_dir: files go to ``checkpoints/epoch=XX-train_loss=X.XXXX.ckpt`` and ``checkpoints/last.ckpt`` below it.

    Returns:
        The last checkpoint.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    resolve_precision(config.precision, process.device)  # refused before anything is made
    run_dir = broadcast_run_dir(run_dir)
    if process.is_main:
        make_demo_data(config.data_module)
    checkpoints = run_dir / "checkpoints"
    with run_lock(checkpoints):
        return _fit(config, run_dir, find_resume(config.resume, checkpoints), process)


def _fit(config: DistillConfig, run_dir: Path, source: Path | None, process: Process) -> Path:
    """Train to the end; the last checkpoint."""
    specs = modality_specs(config.data_module)
    teachers, sources = load_teachers(config, specs, source)
    data = DistillData(config, tuple(teachers), process)
    module = _module(config, teachers, specs, sources, data, run_dir, process)
    report = DataReport(data.dataset, run_dir, is_main=process.is_main)
    with stop_signals(config.stop_signals) as stop_signal:
        trainer = _trainer(config, run_dir, data, source, stop_signal, process.device)
        if module.cache is not None:
            fill = TeacherCacheCallback(
                module.cache, data.dataset, batch_size=config.batch_size, num_workers=config.num_workers
            )
            trainer.callbacks.insert(0, fill)
        # Lightning's own handler of SIGTERM broadcasts inside the handler, where another collective may be under way
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        lines = [_first_line(config, teachers, module, data), report.first_line()]
        if data.validation:
            lines.append(validation_line(data.validation, config))
        if source:
            lines.append(f"resume from {source}")
        elif config.resume:
            lines.append(f"resume=auto: no checkpoint in {run_dir / 'checkpoints'}; training starts anew")
        process.rank_zero_info("\n".join(lines))
        try:
            trainer.fit(module, datamodule=data, ckpt_path=str(source) if source else None, weights_only=True)
        except SystemExit:  # all ranks leave together
            process.rank_zero_info(report.last_line())
            raise
    process.rank_zero_info(report.last_line())
    if trainer.should_stop:
        raise SystemExit(INTERRUPTED_EXIT_CODE)
    return run_dir / "checkpoints" / LAST


def _first_line(config: DistillConfig, teachers: dict[str, Encoder], module: MMDistill, data: DistillData) -> str:
    return (
        f"distil {', '.join(teachers)} into student_rgb: {len(data.dataset)} clips, {len(data.sampler)} batches of "
        f"{config.batch_size} ({data.sampler.num_dropped} clips left out each epoch), base_lr {config.trainer.lr:g} -> "
        f"lr {module.rates.lr:g}"
    )


def _module(
    config: DistillConfig,
    teachers: dict[str, Encoder],
    specs: dict[str, ModalitySpec],
    sources: dict[str, Any],
    data: DistillData,
    run_dir: Path,
    process: Process,
) -> MMDistill:
    t = config.trainer
    global_batch = config.batch_size * process.world_size * t.accumulate_grad_batches
    steps = math.ceil(
        len(data.sampler) / t.accumulate_grad_batches
    )  # Lightning steps at an epoch's end even if fewer accumulated
    module = MMDistill(
        teachers,
        specs,
        rates=LearningRates.scaled(t.lr, t.min_lr, t.warmup_lr, global_batch=global_batch),
        weight_decay=t.weight_decay,
        betas=(t.betas[0], t.betas[1]),
        warmup_steps=round(t.warmup_epochs * steps),
        total_steps=t.epochs * steps,
        meta=_meta(config, teachers, specs, sources),
        save_teachers=t.save_teachers,
        layer_decay=t.layer_decay,
        ema=t.ema,
        nonfinite=NonFiniteGuard(t.on_nonfinite, t.max_skipped_steps, process.rank_zero_info),
    )
    module.student.checkpoint_activations = t.activation_checkpointing
    if config.compile:
        module.compile_encoders()
    if t.cache_teacher_epochs:
        data.dataset.cached_epochs = t.cache_teacher_epochs
        module.cache = TeacherCache(
            run_dir,
            draws=t.cache_teacher_epochs,
            clips=len(data.dataset),
            widths={m: e.config.dim for m, e in teachers.items()},
            key=cache_key(data.dataset, sources, specs, resolve_precision(config.precision, process.device)),
        )
    return module


def _meta(
    config: DistillConfig, teachers: dict[str, Encoder], specs: dict[str, ModalitySpec], sources: dict[str, Any]
) -> dict[str, Any]:
    students = ["student_rgb"] + ["student_ema_rgb"] * (config.trainer.ema is not None)
    geometries = {f"teacher_{m}": to_plain(e.config) for m, e in teachers.items()}
    return {
        "mmdistill_version": __version__,
        "kind": "distill",
        "encoders": {**{part: to_plain(teachers[STUDENT_MODALITY].config) for part in students}, **geometries},
        "decoder": None,
        "statistics": {m: specs[m].statistics for m in teachers},
        "config": to_plain(config),
        "teachers": sources,
    }


def _trainer(
    config: DistillConfig, run_dir: Path, data: DistillData, source: Path | None, stop_signal: Any, device: Any
) -> pl.Trainer:
    t = config.trainer
    checkpoints = run_dir / "checkpoints"
    callbacks: list[pl.Callback] = [
        SetEpochCallback(data.sampler, config.seed),
        EpochMeans(),  # before all that read the epoch's means
        Progress(run_dir, as_names("logger", config.logger), to_plain(config), source),
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
        logger=False,  # `Progress` knows the trackers of both trainings
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=t.check_val_every_n_epoch or 1,
        limit_val_batches=1.0 if data.validation else 0,
    )
