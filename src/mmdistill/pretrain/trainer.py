"""The pretraining loop: one modality, any number of processes, exactly resumable.

Everything random is a pure function of (seed, epoch, clip) or (seed, step, rank), so a resumed run needs no generator
state: it continues at the stored (epoch, batch) with the stored weights and moments, to the last bit on a CPU.
"""

import math
import time
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
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.lock import run_lock
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
from mmdistill.modalities import ModalitySpec, preprocess_clips
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import VideoMAE, masked_indices
from mmdistill.pretrain.deepspeed import make_engine, open_process_group
from mmdistill.pretrain.initialization import load_videomae
from mmdistill.randomness import seed_step, seed_torch, seeded_rng
from mmdistill.training.data_report import DataReport
from mmdistill.training.nonfinite import MIN_LOSS_SCALE, NonFiniteGuard, frozen, grad_norm, zero_loss
from mmdistill.training.optim import LearningRates, make_schedule, param_group_hparams
from mmdistill.training.run_logger import RunLog
from mmdistill.training.signals import stop_signals


@dataclass
class _Progress:
    """Where the run stands: batches done in `epoch`, the sums of the epoch so far, and how many losses they lack."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    trivial_sum: float = 0.0
    unusable: int = 0

    def add(self, losses: tuple[float, float] | None) -> None:
        """One more batch; None where its loss was not finite."""
        self.batch += 1
        if losses is None:
            self.unusable += 1
        else:
            self.loss_sum += losses[0]
            self.trivial_sum += losses[1]

    @property
    def means(self) -> tuple[float, float]:
        """(loss, trivial loss) of the epoch so far; NaN before the first usable batch."""
        count = self.batch - self.unusable
        return (self.loss_sum / count, self.trivial_sum / count) if count else (math.nan, math.nan)

    def restart(self) -> None:
        self.epoch, self.batch, self.loss_sum, self.trivial_sum, self.unusable = self.epoch + 1, 0, 0.0, 0.0, 0


class _Run:
    """The objects of one pretraining run."""

    def __init__(self, config: PretrainConfig, run_dir: Path, process: Process) -> None:
        self.config, self.run_dir, self.process = config, run_dir, process
        data, trainer = config.data_module, config.trainer
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
        # an optimiser step never spans two epochs
        self.batches = len(self.sampler) // trainer.accumulate_grad_batches * trainer.accumulate_grad_batches
        if self.batches == 0:
            clips = config.batch_size * process.world_size * trainer.accumulate_grad_batches
            raise ConfigError(
                f"{len(self.dataset)} clips are fewer than one optimiser step of {clips}; lower batch_size"
            )
        seed_torch(config.seed)
        self.config = make_encoder_config(config.model, data, self.spec)
        model = VideoMAE(self.config, make_decoder_config(config.model), drop_path=config.model.drop_path)
        model.encoder.checkpoint_activations = trainer.activation_checkpointing
        if config.compile:
            model.encoder.compile(dynamic=False)
            model.decoder.compile(dynamic=False)
        self.initialised = load_videomae(model.encoder, config.init_from) if config.init_from else None
        global_batch = config.batch_size * process.world_size * trainer.accumulate_grad_batches
        self.rates = LearningRates.scaled(trainer.lr, trainer.min_lr, trainer.warmup_lr, global_batch=global_batch)
        self.engine = make_engine(config, model, self.rates, process)
        steps = self.batches // trainer.accumulate_grad_batches
        self.schedule = make_schedule(
            self.engine.optimizer if zero_stage(config) else self.engine.basic_optimizer,
            self.rates,
            warmup_steps=round(trainer.warmup_epochs * steps),
            total_steps=trainer.epochs * steps,
        )
        self.total_steps = trainer.epochs * steps
        self.behind = 0  # steps done, less `place`
        self.settings = param_group_hparams(self.schedule.optimizer)
        self.autocast_inputs = resolve_precision(config.precision, process.device)
        self.at = _Progress()
        self.source: Path | None = None
        self.saved: dict[str, float] = {}  # losses of this training's checkpoints, also those in other folders
        self.report = DataReport(self.dataset, run_dir, is_main=process.is_main)
        self.nonfinite = NonFiniteGuard(trainer.on_nonfinite, trainer.max_skipped_steps, process.rank_zero_info)
        self.usable = 0  # batches of the optimiser step at hand with a finite loss
        self.grad_norm = 0.0  # of the last step, before clipping
        # at stage 0 in float32 the gradients are the parameters' own; elsewhere DeepSpeed's optimiser looks after them
        self.plain_gradients = zero_stage(config) == 0 and self.autocast_inputs == "32"

    @property
    def learned(self) -> dict[str, Any]:
        """What the weights have learned with, which their shapes do not tell."""
        decoder = to_plain(make_decoder_config(self.config.model))
        return {**to_plain(self.config), "decoder": decoder, **self.spec.statistics}

    @property
    def order(self) -> dict[str, int]:
        """What decides which clips the batches before a place held."""
        return {
            "seed": self.config.seed,
            "clips": len(self.dataset),
            "global_batch": self.config.batch_size * self.process.world_size,
            "accumulate": self.config.trainer.accumulate_grad_batches,
        }

    @property
    def step(self) -> int:
        """Optimiser steps done, also those of other batches before a resume."""
        return self.place(0) + self.behind

    def place(self, batches: int) -> int:
        """Where the schedule stands after `batches` more: steps of this run's batches from the first epoch on."""
        return (self.at.epoch * self.batches + self.at.batch + batches) // self.config.trainer.accumulate_grad_batches

    @property
    def where(self) -> str:
        """For messages."""
        return f"step {self.step} (epoch {self.at.epoch})"

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of precision=16."""
        return float(self.engine.optimizer.loss_scale) if self.autocast_inputs == "16" else None

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, trivial loss) of one batch; float32 scalars."""
        device = self.process.device
        g = self.config
        clip = batch[self.config.modality].to(device, non_blocking=True)
        visible = batch["visible"].to(device, non_blocking=True)
        x = preprocess_clips(clip, batch["crop_box"], self.spec, (g.height, g.width))
        dtype = next(self.engine.module.parameters()).dtype
        prediction, predict = self.engine(x.to(dtype), visible, self._predicted(visible, batch["index"].tolist()))
        target = patch_targets(x, predict, g.grid, target=self.spec.target)
        return reconstruction_loss(prediction, target), constant_baseline_loss(target, g.channels)

    def _predicted(self, visible: torch.Tensor, clips: list[int]) -> torch.Tensor | None:
        """Tokens to reconstruct under dual masking; None: all that are removed."""
        if self.config.decoder_mask_ratio == 0:
            return None
        removed, place = masked_indices(visible, self.config.num_tokens), (self.config.seed, self.at.epoch, "predicted")
        n, ratio = removed.shape[1], self.config.decoder_mask_ratio
        drawn = np.stack([sample_decoder_tokens(n, ratio=ratio, rng=seeded_rng(*place, clip)) for clip in clips])
        return removed.gather(1, torch.from_numpy(drawn).to(removed.device))

    def meta(self, loss: float) -> dict[str, Any]:
        """What travels with the weights."""
        return {
            "mmdistill_version": __version__,
            "kind": "pretrain",
            "modality": self.config.modality,
            "encoders": {"encoder": to_plain(self.config)},
            "decoder": to_plain(make_decoder_config(self.config.model)),
            "statistics": {self.config.modality: self.spec.statistics},
            "epoch": self.at.epoch,
            "step": self.step,
            "loss": loss,
            "config": to_plain(self.config),
        }

    def save(self, name: str, loss: float) -> Path:
        """Write a checkpoint directory, then remove what retention gives up; all ranks call this."""
        state = {
            "epoch": self.at.epoch,
            "batch": self.at.batch,
            "loss_sum": self.at.loss_sum,
            "trivial_sum": self.at.trivial_sum,
            "unusable": self.at.unusable,
        }
        target = (self.run_dir / "checkpoints" / name).absolute()
        self.saved[str(target)] = loss
        client = {
            "progress": state,
            "learned": self.learned,
            "order": {**self.order, "batches": self.batches},
            "step": self.step,
            "saved": dict(self.saved),
            "skipped_steps": self.nonfinite.skipped,
        }
        path = save_deepspeed(self.engine, target, self.meta(loss), client)
        run_on_all_ranks(self._prune if self.process.is_main else lambda: None, error_class=CheckpointError)
        return path

    def _prune(self) -> None:
        trainer = self.config.trainer
        prune(
            self.run_dir / "checkpoints",
            keep_last=trainer.keep_last,
            save_top_k=trainer.save_top_k,
            protect=[self.source] if self.source else [],
            external_losses={path: loss for path, loss in self.saved.items() if "-step=" not in Path(path).name},
        )

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint directory, as this run's config says: rates, weight decay, betas.

        Raises:
            ConfigError: it was written inside an epoch, and this run's batches are others; or its weights have learned
                with other heads, positions or statistics.
        """
        state = load_deepspeed(self.engine, path)
        # older versions wrote neither "learned" nor "order"
        if other := _other(state.get("learned", {}), self.learned):
            told = ", ".join(f"{k} {stored} / {own}" for k, (stored, own) in other.items())
            raise ConfigError(
                f"resume: {path} has learned with other settings than this run's (checkpoint / run): {told}; set them "
                "as they were, or start anew with resume=null"
            )
        self.source, self.saved = path, dict(state.get("saved", {}))
        self.nonfinite.skipped = int(state.get("skipped_steps", 0))
        self.at = _Progress(**state["progress"])
        stored = state.get("order", {})
        if self.at.batch >= stored.get("batches", self.batches):
            self.at.restart()
        if self.at.batch and (other := _other(stored, self.order)):
            raise ConfigError(batch_order_mismatch(self.at.epoch, other))
        for group, own in zip(self.schedule.optimizer.param_groups, self.settings, strict=True):
            group.update(own)
        self.schedule.step_update(self.place(0))
        self.behind = state.get("step", self.place(0)) - self.place(0)


def _other(stored: dict[str, Any], own: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is stored otherwise than this run has it."""
    return {k: (stored[k], v) for k, v in own.items() if k in stored and stored[k] != v}


def pretrain(config: PretrainConfig, run_dir: Path) -> Path:
    """Pretrain one VideoMAE.

    Args:
        config: the validated config.
        run_dir: the run's folder; checkpoints go to ``checkpoints/epoch=XX-loss=X.XXXX``.

    Returns:
        The last checkpoint directory.

    Raises:
        SystemExit: with `INTERRUPTED_EXIT_CODE` after a signal, when a whole checkpoint of the step in hand is written.
        NonFiniteError: a loss or gradient is not finite; names the step and the clips.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed, timeout_s=config.distributed_timeout_s)
    resolve_precision(config.precision, process.device)  # refused before anything is made
    open_process_group(process)
    run_dir = broadcast_run_dir(run_dir)
    if process.is_main:
        make_demo_data(config.data_module)
    barrier()
    with run_lock(run_dir / "checkpoints"):
        source = find_resume(config.resume, run_dir / "checkpoints")
        return _train(_Run(config, run_dir, process), source)


def _train(run: _Run, source: Path | None) -> Path:
    """All epochs; the last checkpoint."""
    config, run_dir, process = run.config, run.run_dir, run.process
    log = RunLog(
        run_dir,
        total_steps=run.total_steps,
        title=f"pretrain {config.modality}",
        enabled=process.is_main,
        trackers=as_names("logger", config.logger),
        config=to_plain(config),
        source=source,
    )
    with log, stop_signals(config.stop_signals) as stop_signal:
        _say_start(log, run)
        log.say(run.report.first_line())
        saved = None
        if source:
            run.resume(source)
            saved = source
            log.say(f"resumed {source} at epoch {run.at.epoch}, step {run.step}")
            log.continues(source, run.step)
        elif config.resume:
            log.say(f"resume=auto: no checkpoint in {run_dir / 'checkpoints'}; training starts anew")
        while run.at.epoch < config.trainer.epochs:
            saved = _epoch(run, log, stop_signal) or saved
        log.say(run.report.last_line())
    run.engine.destroy()
    if saved is None:
        raise ConfigError("nothing was trained: the checkpoint resumed from is at or past trainer.epochs")
    log.say(f"last checkpoint: {saved}")
    return saved


def _say_start(log: RunLog, run: _Run) -> None:
    if run.initialised:
        log.say(f"initialised from {run.initialised}")
    parameters = sum(p.numel() for p in run.engine.module.parameters())
    left_out = len(run.dataset) - run.batches * run.order["global_batch"]  # with those of an unfinished step
    log.say(
        f"pretrain {run.config.modality}: {len(run.dataset)} clips, {run.batches} batches of {run.config.batch_size} "
        f"per process and epoch ({left_out} clips left out each epoch), {parameters:,} parameters, "
        f"base_lr {run.config.trainer.lr:g} -> lr {run.rates.lr:g}, device {run.process.device}, "
        f"precision {run.autocast_inputs}, target {run.spec.target}"
    )


def _epoch(run: _Run, log: RunLog, stop_signal: Any) -> Path | None:
    """Train to the end of the epoch; returns the checkpoint if this epoch is one to save."""
    at, trainer = run.at, run.config.trainer
    run.engine.train()
    run.sampler.set_state(at.epoch, at.batch)
    began, clips, waited = time.monotonic(), 0, 0.0
    asked = time.monotonic()
    for batch in run.loader:
        waited += time.monotonic() - asked
        seed_step(run.config.seed, at.epoch, at.batch, run.process.rank)
        losses = _train_step(run, batch)
        at.add(losses)
        clips += len(batch["index"]) * run.process.world_size
        seconds = time.monotonic() - began
        note = f"loss {losses[0]:.4f} trivial {losses[1]:.4f}" if losses else "loss not finite"
        wait = f"data wait {100 * waited / seconds:.0f} %"
        log.step(run.step, f"epoch {at.epoch} {note} {clips / seconds:.0f} clips/s {wait}")
        if at.batch >= run.batches:
            break
        boundary = at.batch % trainer.accumulate_grad_batches == 0
        if boundary and all_reduce_any(stop_signal() is not None, run.process.device):
            name = f"epoch={at.epoch:02d}-loss={at.means[0]:.4f}-step={run.step}"
            _stop(run, log, run.save(name, at.means[0]))
        asked = time.monotonic()
    seconds = time.monotonic() - began
    mean, trivial_mean = at.means
    values = {
        "epoch": at.epoch,
        "loss": mean,
        "constant_baseline_loss": trivial_mean,
        "lr": float(run.schedule.optimizer.param_groups[0]["lr"]),
        "clips_per_s": clips / seconds,
        "data_wait_percent": 100 * waited / seconds,
    }
    values |= {"grad_norm": run.grad_norm, "skipped_steps": run.nonfinite.skipped}
    if run.loss_scale is not None:
        values |= {"loss_scale": run.loss_scale, "overflow_steps": run.engine.skipped_steps}
    log.scalars(run.step, values)
    log.say(
        f"epoch {at.epoch}: loss {mean:.4f}, trivial predictor {trivial_mean:.4f} (ratio {mean / trivial_mean:.3f}), "
        f"{clips / seconds:.1f} clips/s, data wait {100 * waited / seconds:.0f} %"
    )
    if trainer.image_every_n_epochs and (at.epoch + 1) % trainer.image_every_n_epochs == 0:
        _picture(run, log)
    saved = None
    ended = at.epoch + 1 == trainer.epochs
    stop = not ended and all_reduce_any(stop_signal() is not None, run.process.device)
    if ended or stop or (at.epoch + 1) % trainer.save_ckpt_freq == 0:
        saved = run.save(f"epoch={at.epoch:02d}-loss={mean:.4f}", mean)
        run.report.write()
        if stop:
            _stop(run, log, saved)
    at.restart()
    return saved


def _picture(run: _Run, log: RunLog) -> None:
    """What the network makes of the first clip and its mask, always the same ones; all ranks call this."""
    from mmdistill.pretrain.visualization import draw, reconstruct, write

    found = reconstruct(run.engine.module, default_collate([run.dataset[0]]), run.spec)
    if run.process.is_main:
        image = draw(found, f"{run.config.modality}, epoch {run.at.epoch}, {run.dataset.index.clips[0].id}")
        write(image, run.run_dir / "pictures" / f"epoch={run.at.epoch:02d}.png")
        log.picture(run.step, "reconstruction", image)


def _stop(run: _Run, log: RunLog, path: Path) -> None:
    """Leave after a signal; all ranks do."""
    log.say(run.report.last_line())
    how = f"continue with resume={path}, or with resume=auto in the same hydra.run.dir"
    log.say(f"stopped by a signal; whole checkpoint written: {path}\n{how}")
    raise SystemExit(INTERRUPTED_EXIT_CODE)


def _train_step(run: _Run, batch: dict[str, torch.Tensor]) -> tuple[float, float] | None:
    """Forward, backward, optimiser step; the losses averaged over ranks, None where they are not finite."""
    accumulate = run.config.trainer.accumulate_grad_batches
    loss, trivial = run.losses(batch)
    mean, trivial_mean = all_reduce_mean([loss, trivial])
    names = [run.dataset.index.clips[i].id for i in batch["index"].tolist()]
    usable = run.nonfinite.check_loss(loss, mean, names, run.where)
    first, last = run.at.batch % accumulate == 0, (run.at.batch + 1) % accumulate == 0
    run.usable = usable if first else run.usable + usable
    if usable or accumulate > 1:
        run.engine.backward(loss if usable else zero_loss(list(run.engine.module.parameters())))
        _optimise(run, last)
    elif not usable:
        run.nonfinite.skip(run.where)
    if last:
        run.schedule.step_update(run.place(1))
    return (mean, trivial_mean) if usable else None


def _optimise(run: _Run, last: bool) -> None:
    """DeepSpeed's step. One without a usable gradient changes no weight."""
    engine, plain = run.engine, run.plain_gradients
    reason = "loss is not finite" if last and not run.usable else None
    if last and plain and reason is None:
        run.grad_norm = grad_norm(list(engine.module.parameters()))
        if not math.isfinite(run.grad_norm):
            reason = "gradient is not finite"
    before, scale = engine.skipped_steps, run.loss_scale
    with frozen(engine.optimizer) if reason else nullcontext():  # DeepSpeed's counts stay in order
        engine.step()
    if last and not plain:
        run.grad_norm = float(engine.get_global_grad_norm() or 0.0)
        if engine.skipped_steps > before and (scale is None or scale <= MIN_LOSS_SCALE):
            reason = "gradient is not finite"
    if reason:
        run.nonfinite.skip(run.where, reason=reason)
