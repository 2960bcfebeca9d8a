"""The pretraining loop: one modality, any number of processes, exactly resumable.

All randomness is a pure function of (seed, epoch, clip) or (seed, epoch, batch, rank). A resumed run therefore needs no
generator state: it continues at the stored (epoch, batch) with the stored weights and moments. On a CPU it is
bit-identical to an uninterrupted run.
"""

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from mmdistill import __version__
from mmdistill.builders import (
    make_clip_dataset,
    make_clip_loader,
    make_decoder_config,
    make_demo_data,
    make_encoder_config,
)
from mmdistill.checkpoint import load_deepspeed, prune, save_deepspeed
from mmdistill.checkpoint.architecture import encoder_config_from_meta
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.locate import locate
from mmdistill.checkpoint.lock import run_lock
from mmdistill.checkpoint.read import read_meta
from mmdistill.checkpoint.retention import find_resume
from mmdistill.config import ConfigError, PretrainConfig, as_names, modality_specs, to_plain, zero_stage
from mmdistill.data.masking import sample_decoder_tokens
from mmdistill.data.sampler import EpochBatchSampler, batch_order_mismatch
from mmdistill.distributed.collectives import (
    all_reduce_any,
    all_reduce_mean,
    barrier,
    broadcast_run_dir,
    run_on_all_ranks,
)
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE, Process, start_process
from mmdistill.errors import format_count
from mmdistill.modalities import ModalitySpec, preprocess_clips
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import VideoMAE, masked_indices
from mmdistill.pretrain.deepspeed import init_process_group, make_engine
from mmdistill.pretrain.initialization import load_videomae
from mmdistill.randomness import seed_step, seed_torch, seeded_rng
from mmdistill.training.compatibility import (
    data_order,
    diff_settings,
    format_difference,
    read_data_order,
    rename_keys,
)
from mmdistill.training.data_report import DataReport
from mmdistill.training.loggers import ResumePoint
from mmdistill.training.nonfinite import MIN_LOSS_SCALE, NonFiniteGuard, grad_norm, skip_optimizer_step, zero_loss
from mmdistill.training.optim import LearningRates, make_schedule, param_group_hparams, schedule_warnings
from mmdistill.training.run_logger import RunLog, baseline_ratio
from mmdistill.training.signals import StopSignal, stop_message, stop_signals

# Names in checkpoints of commit ae7d5c0 and earlier -> names now
_OLD_PROGRESS_NAMES = {"trivial_sum": "constant_baseline_sum", "unusable": "num_skipped_batches"}
_OLD_STATE_NAMES = {"learned": "weight_compat", "order": "data_order"}


@dataclass
class Progress:
    """Position of a run, and the loss sums of the current epoch.

    Attributes:
        epoch: current epoch.
        batch: batches done in it.
        loss_sum, constant_baseline_sum: over the batches with a finite loss.
        num_skipped_batches: batches whose loss was not finite.
    """

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    constant_baseline_sum: float = 0.0
    num_skipped_batches: int = 0

    def add_batch(self, losses: tuple[float, float] | None) -> None:
        """Count a batch with its (loss, constant baseline loss); None if the loss was not finite."""
        self.batch += 1
        if losses is None:
            self.num_skipped_batches += 1
        else:
            self.loss_sum += losses[0]
            self.constant_baseline_sum += losses[1]

    @property
    def means(self) -> tuple[float, float]:
        """Mean (loss, constant baseline loss) of the epoch so far; NaN before the first finite batch."""
        count = self.batch - self.num_skipped_batches
        return (self.loss_sum / count, self.constant_baseline_sum / count) if count else (math.nan, math.nan)

    def start_next_epoch(self) -> None:
        """Move to the first batch of the next epoch."""
        self.epoch += 1
        self.batch, self.loss_sum, self.constant_baseline_sum, self.num_skipped_batches = 0, 0.0, 0.0, 0


class PretrainTrainer:
    """One pretraining run: data, model, DeepSpeed engine, schedule and loop.

    Raises:
        ConfigError: there are fewer clips than one optimizer step needs.
    """

    def __init__(self, config: PretrainConfig, run_dir: Path, process: Process) -> None:
        self.config, self.run_dir, self.process = config, run_dir, process
        data, trainer = config.data_module, config.trainer
        accumulate = trainer.accumulate_grad_batches
        self.dataset = make_clip_dataset(data, (config.modality,), training=True, seed=config.seed)
        self.spec: ModalitySpec = modality_specs(data)[config.modality]
        self.sampler = EpochBatchSampler(
            len(self.dataset),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
        )
        self.loader = make_clip_loader(
            self.dataset,
            num_workers=config.num_workers,
            pin_memory=process.device.type == "cuda",
            batch_sampler=self.sampler,
            timeout_s=config.loader_timeout_s,
        )
        steps_per_epoch = len(self.sampler) // accumulate  # an optimizer step never spans two epochs
        self.batches_per_epoch = steps_per_epoch * accumulate
        global_batch = config.batch_size * process.world_size * accumulate
        if steps_per_epoch == 0:
            raise ConfigError(
                f"{format_count(len(self.dataset), 'clip')} cannot fill one optimizer step of {global_batch}; "
                "lower batch_size"
            )
        seed_torch(config.seed)
        self.encoder_config = make_encoder_config(config.model, data, self.spec)
        self.decoder_config = make_decoder_config(config.model)
        model = VideoMAE(self.encoder_config, self.decoder_config, drop_path=config.model.drop_path)
        model.encoder.set_activation_checkpointing(trainer.activation_checkpointing)
        if config.compile:
            model.encoder.compile(dynamic=False)
            model.decoder.compile(dynamic=False)
        self.load_report = load_videomae(model.encoder, config.init_from) if config.init_from else None
        self.rates = LearningRates.scaled(trainer.lr, trainer.min_lr, trainer.warmup_lr, global_batch=global_batch)
        self.engine = make_engine(config, model, self.rates, process)
        self.total_steps = trainer.epochs * steps_per_epoch
        self.schedule = make_schedule(
            self.engine.optimizer if zero_stage(config) else self.engine.basic_optimizer,
            self.rates,
            warmup_steps=round(trainer.warmup_epochs * steps_per_epoch),
            total_steps=self.total_steps,
        )
        self.group_hparams = param_group_hparams(self.schedule.optimizer)
        self.precision = resolve_precision(config.precision, process.device)
        # at stage 0 in float32 the gradients are in `Parameter.grad`; otherwise DeepSpeed's optimizer holds them
        self.uses_param_grad = zero_stage(config) == 0 and self.precision == "32"
        self.progress = Progress()
        self.step_offset = 0  # optimizer steps done, less `schedule_step`
        self.source: Path | None = None
        self.checkpoint_losses: dict[str, float] = {}  # by path, of all checkpoints of this training in any folder
        self.data_report = DataReport(self.dataset, run_dir, is_main=process.is_main)
        self.nonfinite = NonFiniteGuard(trainer.on_nonfinite, trainer.max_skipped_steps, process.rank_zero_info)
        self.num_finite_batches = 0  # of the current optimizer step
        self.grad_norm = 0.0  # of the last step, before clipping

    @property
    def weight_compat(self) -> dict[str, Any]:
        """Settings that must match on resume; most of them do not affect tensor shapes."""
        return {**to_plain(self.encoder_config), "decoder": to_plain(self.decoder_config), **self.spec.statistics}

    @property
    def data_order(self) -> dict[str, int]:
        """Settings that decide which clips are in the batches before a position."""
        return data_order(
            seed=self.config.seed,
            num_clips=len(self.dataset),
            global_batch=self.config.batch_size * self.process.world_size,
            accumulate_grad_batches=self.config.trainer.accumulate_grad_batches,
        )

    def schedule_step(self, extra_batches: int = 0) -> int:
        """Position of the schedule after `extra_batches` more, if all epochs had this run's number of batches."""
        batches = self.progress.epoch * self.batches_per_epoch + self.progress.batch + extra_batches
        return batches // self.config.trainer.accumulate_grad_batches

    @property
    def step(self) -> int:
        """Optimizer steps done, including steps with another batch size before a resume."""
        return self.schedule_step() + self.step_offset

    @property
    def step_name(self) -> str:
        """Step and epoch, for messages."""
        return f"step {self.step} (epoch {self.progress.epoch})"

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of precision=16."""
        return float(self.engine.optimizer.loss_scale) if self.precision == "16" else None

    # one step ---------------------------------------------------------------------------------------------------------

    def losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, constant baseline loss) of one batch; float32 scalars."""
        device, g = self.process.device, self.encoder_config
        clip = batch[self.config.modality].to(device, non_blocking=True)
        visible = batch["visible"].to(device, non_blocking=True)
        x = preprocess_clips(clip, batch["crop_box"], self.spec, (g.height, g.width))
        dtype = next(self.engine.module.parameters()).dtype
        targets = self._decoder_targets(visible, batch["index"].tolist())
        prediction, predicted = self.engine(x.to(dtype), visible, targets)
        target = patch_targets(x, predicted, g.grid, target=self.spec.target)
        return reconstruction_loss(prediction, target), constant_baseline_loss(target, g.channels)

    def _decoder_targets(self, visible: torch.Tensor, clips: list[int]) -> torch.Tensor | None:
        """Indices of the tokens to reconstruct if decoder_mask_ratio is set, (B, L); None: all removed tokens."""
        ratio = self.config.decoder_mask_ratio
        if ratio == 0:
            return None
        removed = masked_indices(visible, self.encoder_config.num_tokens)
        key = (self.config.seed, self.progress.epoch, "predicted")
        chosen = [sample_decoder_tokens(removed.shape[1], ratio=ratio, rng=seeded_rng(*key, clip)) for clip in clips]
        return removed.gather(1, torch.from_numpy(np.stack(chosen)).to(removed.device))

    def train_step(self, batch: Mapping[str, torch.Tensor]) -> tuple[float, float] | None:
        """Forward and backward pass of one batch, and the optimizer step after the last batch of a step.

        Returns:
            (loss, constant baseline loss), means over all ranks; None if the loss is not finite.
        """
        accumulate = self.config.trainer.accumulate_grad_batches
        is_first, is_last = self.progress.batch % accumulate == 0, (self.progress.batch + 1) % accumulate == 0
        loss, constant_baseline = self.losses(batch)
        mean, constant_baseline_mean = all_reduce_mean([loss, constant_baseline])
        clips = [self.dataset.index.clips[i].id for i in batch["index"].tolist()]
        is_finite = self.nonfinite.check_loss(loss, mean, clips, self.step_name)
        self.num_finite_batches = is_finite if is_first else self.num_finite_batches + is_finite
        if is_finite or accumulate > 1:
            self.engine.backward(loss if is_finite else zero_loss(list(self.engine.module.parameters())))
            self.optimizer_step(is_last=is_last)
        else:
            self.nonfinite.skip_step(self.step_name)
        if is_last:
            self.schedule.step_update(self.schedule_step(1))
        return (mean, constant_baseline_mean) if is_finite else None

    def optimizer_step(self, *, is_last: bool) -> None:
        """DeepSpeed's step after each batch. Without a finite gradient it changes no weight.

        Args:
            is_last: whether this batch is the last one of its optimizer step.
        """
        engine = self.engine
        reason = "loss is not finite" if is_last and not self.num_finite_batches else None
        if is_last and self.uses_param_grad and reason is None:
            self.grad_norm = grad_norm(list(engine.module.parameters()))
            if not math.isfinite(self.grad_norm):
                reason = "gradient is not finite"
        skipped_before, scale = engine.skipped_steps, self.loss_scale
        # DeepSpeed's step runs in any case, because it counts the batches
        with skip_optimizer_step(engine.optimizer) if reason else nullcontext():
            engine.step()
        if is_last and not self.uses_param_grad:
            self.grad_norm = float(engine.get_global_grad_norm() or 0.0)
            if engine.skipped_steps > skipped_before and (scale is None or scale <= MIN_LOSS_SCALE):
                reason = "gradient is not finite"
        if reason:
            self.nonfinite.skip_step(self.step_name, reason=reason)

    # checkpoints ------------------------------------------------------------------------------------------------------

    def meta(self, loss: float) -> dict[str, Any]:
        """Metadata that is stored with the weights."""
        return {
            "mmdistill_version": __version__,
            "kind": "pretrain",
            "modality": self.config.modality,
            "encoders": {"encoder": to_plain(self.encoder_config)},
            "decoder": to_plain(self.decoder_config),
            "statistics": {self.config.modality: self.spec.statistics},
            "epoch": self.progress.epoch,
            "step": self.step,
            "loss": loss,
            "config": to_plain(self.config),
        }

    def save(self, name: str, loss: float) -> Path:
        """Write a checkpoint directory, then prune old ones. Collective."""
        path = (self.run_dir / "checkpoints" / name).absolute()
        self.checkpoint_losses[str(path)] = loss
        client_state = {
            "progress": vars(self.progress).copy(),
            "weight_compat": self.weight_compat,
            "data_order": {**self.data_order, "batches_per_epoch": self.batches_per_epoch},
            "step": self.step,
            "saved": dict(self.checkpoint_losses),
            "skipped_steps": self.nonfinite.skipped_steps,
        }
        saved = save_deepspeed(self.engine, path, self.meta(loss), client_state)
        run_on_all_ranks(
            lambda: self._prune_checkpoints() if self.process.is_main else None, error_class=CheckpointError
        )
        return saved

    def _prune_checkpoints(self) -> None:
        full_epochs = {path: loss for path, loss in self.checkpoint_losses.items() if "-step=" not in Path(path).name}
        prune(
            self.run_dir / "checkpoints",
            keep_last=self.config.trainer.keep_last,
            save_top_k=self.config.trainer.save_top_k,
            protect=[self.source] if self.source else [],
            external_losses=full_epochs,
        )

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint directory. Learning rates, weight decay and betas are those of this run's config.

        Raises:
            ConfigError: the checkpoint's heads, position embeddings or statistics differ from this run's; or it was
                written inside an epoch whose batches differ from this run's.
        """
        state = _read_client_state(load_deepspeed(self.engine, path))
        if difference := diff_settings(state["weight_compat"], self.weight_compat):
            raise ConfigError(
                f"resume: {path} was trained with other settings than this run's (checkpoint / run): "
                f"{format_difference(difference)}; use the same settings, or start from scratch with resume=null"
            )
        self.source, self.checkpoint_losses = path, dict(state.get("saved", {}))
        self.nonfinite.skipped_steps = int(state.get("skipped_steps", 0))
        self.progress = Progress(**state["progress"])
        stored_order = state["data_order"]
        if self.progress.batch >= stored_order.get("batches_per_epoch", self.batches_per_epoch):
            self.progress.start_next_epoch()
        if self.progress.batch and (difference := diff_settings(stored_order, self.data_order)):
            raise ConfigError(batch_order_mismatch(self.progress.epoch, difference))
        for group, hparams in zip(self.schedule.optimizer.param_groups, self.group_hparams, strict=True):
            group.update(hparams)
        self.schedule.step_update(self.schedule_step())
        self.step_offset = state.get("step", self.schedule_step()) - self.schedule_step()

    # the loop ---------------------------------------------------------------------------------------------------------

    def train(self, source: Path | None) -> Path:
        """Train all epochs, from the checkpoint `source` on if it is given; returns the last checkpoint.

        Raises:
            SystemExit: with `INTERRUPTED_EXIT_CODE`, after a signal.
        """
        config = self.config
        if source:
            self.resume(source)
        log = RunLog(
            self.run_dir,
            total_steps=self.total_steps,
            title=f"pretrain {config.modality}",
            enabled=self.process.is_main,
            trackers=as_names("logger", config.logger),
            config=to_plain(config),
            resume=ResumePoint(source, self.step) if source else None,
        )
        last_checkpoint = source
        with log, stop_signals(config.stop_signals) as stop_signal:
            self._log_start(log)
            while self.progress.epoch < config.trainer.epochs:
                last_checkpoint = self.train_epoch(log, stop_signal) or last_checkpoint
            log.info(self.data_report.end_summary())
            log.info(f"last checkpoint: {last_checkpoint}")
        self.engine.destroy()
        assert last_checkpoint is not None  # the last epoch is always saved, and trainer.epochs is positive
        return last_checkpoint

    def _log_start(self, log: RunLog) -> None:
        config = self.config
        if self.load_report:
            log.info(f"initialized from {self.load_report}")
        num_parameters = sum(p.numel() for p in self.engine.module.parameters())
        num_skipped_clips = len(self.dataset) - self.batches_per_epoch * self.data_order["global_batch"]
        log.info(
            f"pretrain {config.modality}: {format_count(len(self.dataset), 'clip')}, "
            f"{format_count(self.batches_per_epoch, 'batch')} of {config.batch_size} per process and epoch "
            f"({format_count(num_skipped_clips, 'clip')} skipped each epoch), "
            f"{num_parameters:,} parameters, base_lr {config.trainer.lr:g} -> lr {self.rates.lr:g}, "
            f"device {self.process.device}, precision {self.precision}, target {self.spec.target}"
        )
        log.info(self.data_report.start_summary())
        if self.process.is_main:
            meta = read_meta(locate(self.source)) if self.source else None
            log.info("\n".join(schedule_warnings(config.trainer, meta)))
        if self.source:
            log.info(f"resumed from {self.source} at epoch {self.progress.epoch}, step {self.step}")
            if self.progress.epoch >= config.trainer.epochs:
                log.info(f"training is already complete: trainer.epochs={config.trainer.epochs}")
        elif config.resume:
            log.info(f"resume=auto: no checkpoint in {self.run_dir / 'checkpoints'}; training starts from scratch")

    def train_epoch(self, log: RunLog, stop_signal: StopSignal) -> Path | None:
        """Train to the end of the current epoch; returns the checkpoint if one is saved at its end."""
        progress, trainer = self.progress, self.config.trainer
        self.engine.train()
        self.sampler.set_state(progress.epoch, progress.batch)
        start, num_clips, wait_s = time.monotonic(), 0, 0.0
        wait_start = start
        for batch in self.loader:
            wait_s += time.monotonic() - wait_start
            seed_step(self.config.seed, progress.epoch, progress.batch, self.process.rank)
            losses = self.train_step(batch)
            progress.add_batch(losses)
            num_clips += len(batch["index"]) * self.process.world_size
            elapsed_s = time.monotonic() - start
            note = f"loss {losses[0]:.4f} constant baseline {losses[1]:.4f}" if losses else "loss not finite"
            data_wait = f"data wait {100 * wait_s / elapsed_s:.0f} %"
            log.step(self.step, f"epoch {progress.epoch} {note} {num_clips / elapsed_s:.0f} clips/s {data_wait}")
            if progress.batch >= self.batches_per_epoch:
                break
            is_step_end = progress.batch % trainer.accumulate_grad_batches == 0
            if is_step_end and all_reduce_any(stop_signal() is not None, self.process.device):
                name = f"epoch={progress.epoch:02d}-loss={progress.means[0]:.4f}-step={self.step}"
                self.save_and_stop(log, name, progress.means[0])
            wait_start = time.monotonic()
        elapsed_s = time.monotonic() - start
        self._log_epoch(log, clips_per_s=num_clips / elapsed_s, data_wait_percent=100 * wait_s / elapsed_s)
        if trainer.image_every_n_epochs and (progress.epoch + 1) % trainer.image_every_n_epochs == 0:
            self._log_reconstruction(log)
        checkpoint, loss = None, progress.means[0]
        name = f"epoch={progress.epoch:02d}-loss={loss:.4f}"
        is_last_epoch = progress.epoch + 1 == trainer.epochs
        if not is_last_epoch and all_reduce_any(stop_signal() is not None, self.process.device):
            self.save_and_stop(log, name, loss)
        if is_last_epoch or (progress.epoch + 1) % trainer.save_ckpt_freq == 0:
            checkpoint = self.save(name, loss)
            self.data_report.write()
        progress.start_next_epoch()
        return checkpoint

    def _log_epoch(self, log: RunLog, *, clips_per_s: float, data_wait_percent: float) -> None:
        """The epoch's metrics and its log line."""
        epoch, (loss, constant_baseline) = self.progress.epoch, self.progress.means
        metrics = {
            "epoch": epoch,
            "loss": loss,
            "constant_baseline_loss": constant_baseline,
            "lr": float(self.schedule.optimizer.param_groups[0]["lr"]),
            "clips_per_s": clips_per_s,
            "data_wait_percent": data_wait_percent,
            "grad_norm": self.grad_norm,
            "skipped_steps": self.nonfinite.skipped_steps,
        }
        if self.loss_scale is not None:
            metrics |= {"loss_scale": self.loss_scale, "overflow_steps": self.engine.skipped_steps}
        log.log_metrics(self.step, metrics)
        ratio = baseline_ratio(loss, constant_baseline)
        log.info(
            f"epoch {epoch}: loss {loss:.4f} (constant baseline {constant_baseline:.4f}, ratio {ratio:.3f}, lower is "
            f"better), {clips_per_s:.1f} clips/s, data wait {data_wait_percent:.0f} %"
        )

    def _log_reconstruction(self, log: RunLog) -> None:
        """An image of the reconstruction of the first clip, with the same mask each time. Collective."""
        from mmdistill.pretrain.visualization import draw, reconstruct, write_png

        reconstruction = reconstruct(self.engine.module, default_collate([self.dataset[0]]), self.spec)
        if self.process.is_main:
            epoch, clip = self.progress.epoch, self.dataset.index.clips[0].id
            image = draw(reconstruction, f"{self.config.modality}, epoch {epoch}, {clip}")
            write_png(image, self.run_dir / "images" / f"epoch={epoch:02d}.png")
            log.log_image(self.step, "reconstruction", image)

    def save_and_stop(self, log: RunLog, name: str, loss: float) -> None:
        """Write a checkpoint and exit after a signal. Collective."""
        path = self.save(name, loss)
        log.info(self.data_report.end_summary())
        log.info(stop_message(path))
        raise SystemExit(INTERRUPTED_EXIT_CODE)


def _read_client_state(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The state that `PretrainTrainer.save` stores, also from a checkpoint of an older version."""
    state = rename_keys(stored, _OLD_STATE_NAMES)
    state["progress"] = rename_keys(state["progress"], _OLD_PROGRESS_NAMES)
    state["data_order"] = read_data_order(state.get("data_order", {}))
    compat = state.get("weight_compat", {})
    if compat:
        compat = {**compat, **to_plain(encoder_config_from_meta(compat))}
    return {**state, "weight_compat": compat}


def pretrain(config: PretrainConfig, run_dir: Path) -> Path:
    """Pretrain one VideoMAE.

    Args:
        config: the validated config.
        run_dir: the run's folder; checkpoints are ``checkpoints/epoch=XX-loss=X.XXXX``.

    Returns:
        The last checkpoint directory. A run that resumes from a checkpoint of the last epoch returns it at once.

    Raises:
        SystemExit: with `INTERRUPTED_EXIT_CODE` after a signal, when a complete checkpoint is written.
        NonFiniteError: a loss or gradient is not finite; names the step and the clips.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    resolve_precision(config.precision, process.device)  # raise before anything is created
    init_process_group(process)
    run_dir = broadcast_run_dir(run_dir)
    if process.is_main:
        make_demo_data(config.data_module)
    barrier()
    with run_lock(run_dir / "checkpoints"):
        source = find_resume(config.resume, run_dir / "checkpoints")
        return PretrainTrainer(config, run_dir, process).train(source)
