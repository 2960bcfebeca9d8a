"""One distillation run: load the teachers, build the module and the Trainer, fit."""

import math
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from mmdistill import __version__
from mmdistill.build import check_token_grid, clip_dataset, clip_loader, make_demo_data
from mmdistill.checkpoint import load_encoder, newest_complete, read_checkpoint
from mmdistill.config import ConfigError, DistillConfig, modality_specs, teacher_paths, to_plain
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.distill.callbacks import EpochCheckpoints, EpochLines, SetEpoch, StopOnSignal, VerifiedCheckpointIO
from mmdistill.distill.module import MMDistill
from mmdistill.fewshot.embed import weights_digest
from mmdistill.modality import ModalitySpec
from mmdistill.models.videomae import Encoder
from mmdistill.optim import LearningRates
from mmdistill.runtime import resolve_precision, start_process, stop_signals

_LIGHTNING_PRECISION = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def load_teachers(config: DistillConfig, specs: dict[str, ModalitySpec]) -> tuple[dict[str, Encoder], dict[str, Any]]:
    """The teachers by modality, and for each the path and the sha256 of its encoder's tensors.

    Raises `ConfigError` where a checkpoint was trained on another modality, other statistics or another token grid.
    """
    teachers, sources = {}, {}
    for modality, path in teacher_paths(config.trainer).items():
        checkpoint = read_checkpoint(path)
        found = checkpoint.meta.get("modality")
        if found is not None and found != modality:
            raise ConfigError(
                f"trainer.ckpt_path: {path} is a {found} checkpoint, given as the {modality} teacher; "
                "check the order (rgb, flow, skeleton)"
            )
        encoder = load_encoder(checkpoint)
        spec = specs[modality]
        check_token_grid(encoder, spec, config.data_module, path)
        stored = (checkpoint.meta.get("statistics") or {}).get(modality)
        if stored and (tuple(stored["mean"]), tuple(stored["std"])) != (spec.mean, spec.std):
            raise ConfigError(
                f"data_module.modalities.{modality}: mean/std {spec.mean}/{spec.std} differ from those {path} was "
                f"trained with ({stored['mean']}/{stored['std']}); use the same dataset config in both phases"
            )
        teachers[modality] = encoder
        sources[f"teacher_{modality}"] = {"path": str(path), "sha256": weights_digest(encoder)}
    return teachers, sources


class _Data(pl.LightningDataModule):
    def __init__(
        self, config: DistillConfig, modalities: tuple[str, ...], sampler_place: tuple[int, int], pin: bool
    ) -> None:
        super().__init__()
        rank, world_size = sampler_place
        self.dataset = clip_dataset(config.data_module, modalities, training=True, seed=config.seed)
        self.sampler = EpochBatchSampler(
            len(self.dataset), batch_size=config.batch_size, seed=config.seed, rank=rank, world_size=world_size
        )
        if len(self.sampler) == 0:
            raise ConfigError(
                f"{len(self.dataset)} clips are fewer than one batch of batch_size={config.batch_size}; lower it"
            )
        self._workers, self._pin = config.num_workers, pin

    def train_dataloader(self) -> Any:
        """Called after a checkpoint's loop state is restored, so the first epoch is the right one."""
        if self.trainer is not None:
            self.sampler.set_state(self.trainer.current_epoch, 0)
        return clip_loader(self.dataset, num_workers=self._workers, pin=self._pin, batch_sampler=self.sampler)


def distill(config: DistillConfig, run_dir: Path) -> Path:
    """Distil the teachers of `trainer.ckpt_path` into one RGB student.

    Args:
        config: the validated config.
        run_dir: files go to ``checkpoints/epoch=XX-train_loss=X.XXXX.ckpt`` and ``checkpoints/last.ckpt`` below it.

    Returns:
        The last checkpoint.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed)
    make_demo_data(config.data_module)
    specs = modality_specs(config.data_module)
    teachers, sources = load_teachers(config, specs)
    data = _Data(config, tuple(teachers), (process.rank, process.world_size), process.device.type == "cuda")
    t = config.trainer
    global_batch = config.batch_size * process.world_size * t.accumulate
    steps = math.ceil(
        len(data.sampler) / t.accumulate
    )  # Lightning steps at an epoch's end even if fewer were accumulated
    rates = LearningRates.scaled(t.lr, t.min_lr, t.warmup_lr, global_batch=global_batch)
    module = MMDistill(
        teachers,
        specs,
        rates=rates,
        weight_decay=t.weight_decay,
        betas=(t.betas[0], t.betas[1]),
        warmup_steps=round(t.warmup_epochs * steps),
        total_steps=t.epochs * steps,
        meta=_meta(config, teachers, specs, sources),
    )
    module.student.checkpoint_activations = t.activation_checkpointing
    with stop_signals() as stop_signal:
        trainer = _trainer(config, run_dir, data, stop_signal, process.device)
        if trainer.is_global_zero:
            print(
                f"distil {', '.join(teachers)} into student_rgb: {len(data.dataset)} clips, "
                f"{len(data.sampler)} batches of "
                f"{config.batch_size} ({data.sampler.dropped} clips left out each epoch), "
                f"base_lr {t.lr:g} -> lr {rates.lr:g}"
            )
        trainer.fit(module, datamodule=data, ckpt_path=_resume(config, run_dir), weights_only=True)
    return run_dir / "checkpoints" / "last.ckpt"


def _resume(config: DistillConfig, run_dir: Path) -> str | None:
    if config.resume is None:
        return None
    if config.resume == "auto":
        newest = newest_complete(run_dir / "checkpoints")
        return str(newest) if newest else None
    if not Path(config.resume).expanduser().exists():
        raise ConfigError(f"resume={config.resume} does not exist; give a .ckpt file, or resume=auto")
    return str(Path(config.resume).expanduser())


def _meta(
    config: DistillConfig, teachers: dict[str, Encoder], specs: dict[str, ModalitySpec], sources: dict[str, Any]
) -> dict[str, Any]:
    geometries = {f"teacher_{m}": to_plain(e.geometry) for m, e in teachers.items()}
    return {
        "mmdistill_version": __version__,
        "kind": "distill",
        "encoders": {"student_rgb": to_plain(teachers["rgb"].geometry), **geometries},
        "decoder": None,
        "statistics": {m: {"mean": list(specs[m].mean), "std": list(specs[m].std)} for m in teachers},
        "config": to_plain(config),
        "teachers": sources,
    }


def _trainer(config: DistillConfig, run_dir: Path, data: _Data, stop_signal: Any, device: Any) -> pl.Trainer:
    t = config.trainer
    checkpoints = run_dir / "checkpoints"
    callbacks: list[pl.Callback] = [
        EpochCheckpoints(checkpoints, save_ckpt_freq=t.save_ckpt_freq),
        SetEpoch(data.sampler),
        StopOnSignal(stop_signal, checkpoints / "last.ckpt"),
        EpochLines(),
    ]
    terminal = sys.stderr.isatty()
    if terminal:
        callbacks.append(RichProgressBar())
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=config.devices,
        strategy=config.strategy,
        precision=_LIGHTNING_PRECISION[resolve_precision(config.precision, device)],
        max_epochs=t.epochs,
        accumulate_grad_batches=t.accumulate,
        gradient_clip_val=t.clip_grad,
        logger=[CSVLogger(run_dir, name="", version=""), TensorBoardLogger(run_dir, name="tensorboard", version="")],
        callbacks=callbacks,
        plugins=[VerifiedCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
