"""One distillation run: load the teachers, create the module and the Trainer, fit."""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from mmdistill.builders import check_pooling, configured_pooling
from mmdistill.checkpoint.errors import CheckpointError, name_setting
from mmdistill.checkpoint.references import labeled_sources
from mmdistill.checkpoint.retention import link_or_copy
from mmdistill.config import ConfigError, DistillConfig, modality_specs, standardization, teacher_weights
from mmdistill.distill.callbacks import (
    LAST,
    EpochCheckpoints,
    ResumableLoader,
    StepCallback,
    TrainingCallback,
    pruning_scores,
)
from mmdistill.distill.feature_file import FeatureFile
from mmdistill.distill.ledger import Ledger, target_settings
from mmdistill.distill.module import MMDistill, StudentOptions, TargetOptions
from mmdistill.distill.strategy import strategy_kwargs
from mmdistill.distill.teacher_cache import TeacherCache, TeacherCacheCallback, cache_key
from mmdistill.distill.teachers import Teachers, load_all_teachers
from mmdistill.distill.validation import Validation, make_validation
from mmdistill.distributed.collectives import run_on_all_ranks
from mmdistill.errors import format_count
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec
from mmdistill.training.monitoring import METRIC
from mmdistill.training.old_checkpoints import upgrade_distill_checkpoint
from mmdistill.training.run import Run, Training, complete_message, open_run, prune_checkpoints, start_training
from mmdistill.training.run_logger import RunLog
from mmdistill.training.state import TrainingState
from mmdistill.training.train_data import make_train_data

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

    Checkpoints are ``checkpoints/epoch=XX-train_loss=X.XXXX.ckpt`` and ``checkpoints/last.ckpt`` in `run_dir`.

    Returns:
        The last checkpoint. A run that resumes from a checkpoint of the last epoch returns it at once.

    Raises:
        ConfigError: there are fewer clips than one batch, or see `load_teachers` and `Training.load_state_dict`.
        SystemExit: with `INTERRUPTED_EXIT_CODE` after a signal, when a complete checkpoint is written.
        NonFiniteError: a loss or gradient is not finite; names the step and the clips.
    """
    with open_run(config, run_dir) as run:
        if run.resumed and _is_complete(run.resumed.stored_meta, config.trainer.epochs):
            _finish_last_save(config, run, run.resumed.content)
            with RunLog(run.directory, title="distill", total_steps=0, enabled=run.process.is_main) as log:
                log.info(f"{complete_message(config)}\nlast checkpoint: {run.resumed.path}")
            return run.resumed.path
        specs = modality_specs(config.data_module)
        teachers = load_all_teachers(config, specs, run.resumed)
        pooling = configured_pooling(config)
        for modality, encoder in teachers.encoders.items():
            check_pooling(pooling, encoder, f"teacher_{modality}")
        data = make_train_data(
            config,
            tuple(dict.fromkeys((STUDENT_MODALITY, *teachers.encoders))),
            run.process,
            cached_epochs=config.trainer.cache_teacher_epochs,
            needs_motion=pooling.name == "motion",
            loader_class=ResumableLoader,
        )
        with start_training(config, run, data, title="distill", weight_compat={"pooling": str(pooling)}) as training:
            if run.resumed:  # before tensors are loaded: some poolings change their shapes
                training.check_weight_compat(_stored_state(run.resumed.content))
            return _fit(config, training, teachers, specs)


def _finish_last_save(config: DistillConfig, run: Run, content: Mapping[str, Any]) -> None:
    """Link ``last.ckpt`` and remove old checkpoints, if the run was killed before that. Collective."""
    source, last, state = run.source, run.checkpoints / LAST, TrainingState()
    stored = content.get("callbacks", {}).get(EpochCheckpoints.__name__)
    if not source or source.parent != run.checkpoints or not stored:
        return
    if source != last:
        run_on_all_ranks(
            lambda: link_or_copy(source, last) if run.process.is_main else None, error_class=CheckpointError
        )
    state.load_state_dict(stored)
    prune_checkpoints(config, run, state, pruning_scores(state, config.trainer.monitor))


def _stored_state(content: Any) -> Mapping[str, Any]:
    """The state of `EpochCheckpoints` in the content of a checkpoint of any version; empty for a directory."""
    if not isinstance(content, dict):
        return {}
    state: Mapping[str, Any] = upgrade_distill_checkpoint(content)["callbacks"]["EpochCheckpoints"]
    return state


def _is_complete(meta: Mapping[str, Any], epochs: int) -> bool:
    """Whether a checkpoint with these metadata was written at the end of the last epoch."""
    return meta.get("kind") == "distill" and not meta.get("batch") and int(meta.get("epoch", -1)) + 1 >= epochs


def _fit(config: DistillConfig, training: Training, teachers: Teachers, specs: Mapping[str, ModalitySpec]) -> Path:
    """Train to the end; returns the last checkpoint."""
    run, data, trainer_config = training.run, training.data, config.trainer
    module = _make_module(config, training, teachers, specs)
    made = make_validation(config, run.process, training.log.info, labeled_sources(teachers.meta))
    validation = made if isinstance(made, Validation) else None
    validation_line = f"\n{validation.summary(config)}" if validation else f"\nno {METRIC}: {made}" if made else ""
    students = ["student_rgb"] if trainer_config.ema is None else ["student_rgb", "student_ema_rgb"]
    encoders = dict.fromkeys(students, module.student.config)
    encoders |= {f"teacher_{modality}": encoder.config for modality, encoder in teachers.encoders.items()}
    ledger = Ledger(training, teachers.files)
    settings = "".join(f", {text}" for text in target_settings(config))
    more = f"{settings}{validation_line}{_feature_file_lines(config, training, teachers.files)}"
    title = f"distill {', '.join(module.names)} into student_rgb"
    callbacks = [
        *([TeacherCacheCallback(module.cache, training)] if module.cache else []),
        StepCallback(training),
        ledger,
        TrainingCallback(training, title, more, module.target_options.weights),
        EpochCheckpoints(
            training,
            encoders=encoders,
            statistics={m: specs[m].statistics for m in (STUDENT_MODALITY, *teachers.encoders)},
            sources=teachers.sources,
            student_sources=teachers.student_sources,
            monitor=trainer_config.monitor,
            ledger=ledger,
        ),
        *([validation] if validation else []),
    ]
    trainer = _make_trainer(config, training, callbacks)
    trainer.fit(
        module,
        data.loader,
        validation.dataloader() if validation else [],
        ckpt_path=str(run.source) if run.source else None,
        weights_only=True,
    )
    last_checkpoint = run.checkpoints / LAST
    if trainer.should_stop:
        training.stop(last_checkpoint)
    training.log_end(last_checkpoint)
    return last_checkpoint


def _feature_file_lines(config: DistillConfig, training: Training, files: Mapping[str, FeatureFile]) -> str:
    """A log line for each teacher that is a file, and one if an augmentation changes the clips."""
    data, lines = config.data_module, []
    num_clips = len(training.data.dataset)
    for name, file in files.items():
        unused = len(file.positions) - num_clips
        lines.append(
            f"teacher {name}: features of width {file.width} of {format_count(num_clips, 'clip')} from {file.path}"
            + (f"; {format_count(unused, 'other clip')} in it not used" if unused else "")
        )
    if files and (data.hflip_prob or data.random_crop_min_scale < 1):
        lines.append(
            f"the features of {', '.join(files)} belong to clips without augmentation, but data_module.hflip_prob="
            f"{data.hflip_prob:g} and data_module.random_crop_min_scale={data.random_crop_min_scale:g} change the clips"
        )
    return "".join(f"\n{line}" for line in lines)


def _make_module(
    config: DistillConfig, training: Training, teachers: Teachers, specs: Mapping[str, ModalitySpec]
) -> MMDistill:
    dataset, trainer_config, cache = training.data.dataset, config.trainer, None
    network_sources = {name: teachers.sources[name] for name in (f"teacher_{m}" for m in teachers.encoders)}
    pooling = configured_pooling(config)
    if trainer_config.cache_teacher_epochs and teachers.encoders:
        cache = TeacherCache(
            training.run.directory,
            num_draws=trainer_config.cache_teacher_epochs,
            num_clips=len(dataset),
            widths={m: pooling.num_parts * encoder.config.dim for m, encoder in teachers.encoders.items()},
            key=cache_key(dataset, network_sources, specs, training.run.precision, pooling),
        )
    ids = [clip.id for clip in dataset.index.clips] if teachers.files else []
    features = {}
    for name, file in teachers.files.items():
        with name_setting(f"trainer.ckpt_path.{name}.file"):
            features[name] = file.select(ids)
    targets = TargetOptions(
        standardization("trainer.standardize_targets", trainer_config.standardize_targets),
        teacher_weights(trainer_config),
        cache,
        features,
    )
    try:
        module = MMDistill(
            teachers.encoders,
            specs,
            training.optimization,
            guard=training.guard,
            targets=targets,
            sources=teachers.sources,
            save_teachers=trainer_config.save_teachers,
            student=StudentOptions(teachers.student, trainer_config.ema, pooling),
        )
    except ValueError as error:
        raise ConfigError(f"trainer.standardize_targets: {error}") from error
    module.student.set_activation_checkpointing(trainer_config.activation_checkpointing)
    if config.compile:
        module.compile_encoders()
    return module


def _make_trainer(config: DistillConfig, training: Training, callbacks: list[pl.Callback]) -> pl.Trainer:
    hide_lightning_noise()
    validates = any(isinstance(callback, Validation) for callback in callbacks)
    trainer = pl.Trainer(
        accelerator="gpu" if training.run.process.device.type == "cuda" else "cpu",
        **strategy_kwargs(config, training.run.precision),
        max_epochs=config.trainer.epochs,
        accumulate_grad_batches=config.trainer.accumulate_grad_batches,
        gradient_clip_val=config.trainer.clip_grad,
        logger=False,  # `Training` writes the log
        callbacks=callbacks,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=config.trainer.check_val_every_n_epoch or 1,
        limit_val_batches=1.0 if validates else 0,
    )
    # Lightning's SIGTERM handler runs a broadcast inside the handler, possibly during another collective
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer
