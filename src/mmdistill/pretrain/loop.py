"""The pretraining loop: one modality, any number of processes, exactly resumable.

Everything random is a pure function of (seed, epoch, clip) or (seed, step, rank), so a resumed run needs no generator
state: it continues at the stored (epoch, batch) with the stored weights and moments, to the last bit on a CPU.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdistill import __version__
from mmdistill.build import clip_dataset, clip_loader, decoder_geometry, encoder_geometry, make_demo_data
from mmdistill.checkpoint import load_deepspeed, save_deepspeed
from mmdistill.config import PretrainConfig, modality_specs, to_plain
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.modality import ModalitySpec
from mmdistill.models.inputs import prepare
from mmdistill.models.videomae import VideoMAE, complement, patch_targets, reconstruction_loss, trivial_loss
from mmdistill.optim import LearningRates, make_schedule
from mmdistill.pretrain.engine import any_rank, make_engine, mean_over_ranks, open_process_group
from mmdistill.pretrain.start import find_resume, load_videomae
from mmdistill.runlog import RunLog
from mmdistill.runtime import INTERRUPTED_EXIT_CODE, Process, resolve_precision, start_process, stop_signals


@dataclass
class _Progress:
    """Where the run stands: batches done in `epoch`, and the sums of the epoch so far."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    trivial_sum: float = 0.0

    def restart(self) -> None:
        self.epoch, self.batch, self.loss_sum, self.trivial_sum = self.epoch + 1, 0, 0.0, 0.0


class _Run:
    """The objects of one pretraining run."""

    def __init__(self, config: PretrainConfig, run_dir: Path, process: Process) -> None:
        self.config, self.run_dir, self.process = config, run_dir, process
        self.spec: ModalitySpec = modality_specs(config.data_module)[config.modality]
        data, trainer = config.data_module, config.trainer
        self.dataset = clip_dataset(data, (config.modality,), training=True, seed=config.seed)
        self.sampler = EpochBatchSampler(
            len(self.dataset),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=process.rank,
            world_size=process.world_size,
        )
        self.loader = clip_loader(
            self.dataset, num_workers=config.num_workers, pin=process.device.type == "cuda", batch_sampler=self.sampler
        )
        # an optimiser step never spans two epochs
        self.batches = len(self.sampler) // trainer.accumulate * trainer.accumulate
        if self.batches == 0:
            clips = config.batch_size * process.world_size * trainer.accumulate
            raise ValueError(
                f"{len(self.dataset)} clips are fewer than one optimiser step of {clips}; lower batch_size"
            )
        torch.manual_seed(config.seed)
        self.geometry = encoder_geometry(config.model, data, self.spec)
        model = VideoMAE(self.geometry, decoder_geometry(config.model), drop_path=config.model.drop_path)
        model.encoder.checkpoint_activations = trainer.activation_checkpointing
        self.initialised = load_videomae(model.encoder, config.pretrain) if config.pretrain else None
        global_batch = config.batch_size * process.world_size * trainer.accumulate
        self.rates = LearningRates.scaled(trainer.lr, trainer.min_lr, trainer.warmup_lr, global_batch=global_batch)
        self.engine = make_engine(config, model, self.rates, process)
        steps = self.batches // trainer.accumulate
        self.schedule = make_schedule(
            self.engine.optimizer if config.deepspeed.zero_stage else self.engine.basic_optimizer,
            self.rates,
            warmup_steps=round(trainer.warmup_epochs * steps),
            total_steps=trainer.epochs * steps,
        )
        self.total_steps = trainer.epochs * steps
        self.autocast_inputs = resolve_precision(config.precision, process.device)
        self.at = _Progress()

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return (self.at.epoch * self.batches + self.at.batch) // self.config.trainer.accumulate

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss, trivial loss) of one batch; float32 scalars."""
        device = self.process.device
        g = self.geometry
        clip = batch[self.config.modality].to(device, non_blocking=True)
        visible = batch["visible"].to(device, non_blocking=True)
        x = prepare(clip, batch["view"], self.spec, (g.height, g.width))
        dtype = next(self.engine.module.parameters()).dtype
        prediction, predict = self.engine(x.to(dtype), visible, self._predicted(visible))
        target = patch_targets(x, predict, g.grid, kind=self.spec.target)
        return reconstruction_loss(prediction, target), trivial_loss(target, g.channels)

    def _predicted(self, visible: torch.Tensor) -> torch.Tensor | None:
        """Tokens to reconstruct under dual masking: a part of the removed ones, seeded by the step; None: all."""
        ratio = self.config.decoder_mask_ratio
        if ratio == 0:
            return None
        removed = complement(visible, self.geometry.tokens)
        keep = max(1, round(removed.shape[1] * (1 - ratio)))
        order = torch.rand(removed.shape, device=removed.device).argsort(dim=1)[:, :keep]
        return removed.gather(1, order).sort(dim=1).values

    def meta(self, loss: float) -> dict[str, Any]:
        """What travels with the weights."""
        return {
            "mmdistill_version": __version__,
            "kind": "pretrain",
            "modality": self.config.modality,
            "encoders": {"encoder": to_plain(self.geometry)},
            "decoder": to_plain(decoder_geometry(self.config.model)),
            "statistics": {self.config.modality: {"mean": list(self.spec.mean), "std": list(self.spec.std)}},
            "epoch": self.at.epoch,
            "step": self.step,
            "loss": loss,
            "config": to_plain(self.config),
        }

    def save(self, name: str, loss: float) -> Path:
        """Write a checkpoint directory; all ranks call this."""
        state = {
            "epoch": self.at.epoch,
            "batch": self.at.batch,
            "loss_sum": self.at.loss_sum,
            "trivial_sum": self.at.trivial_sum,
        }
        return save_deepspeed(self.engine, self.run_dir / "checkpoints" / name, self.meta(loss), {"progress": state})

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint directory."""
        state = load_deepspeed(self.engine, path)
        self.at = _Progress(**state["progress"])
        if self.at.batch >= self.batches:
            self.at.restart()
        self.schedule.step_update(self.step)


def pretrain(config: PretrainConfig, run_dir: Path) -> Path:
    """Pretrain one VideoMAE.

    Args:
        config: the validated config.
        run_dir: the run's folder; checkpoints go to ``checkpoints/epoch=XX-loss=X.XXXX``.

    Returns:
        The last checkpoint directory.

    Raises:
        SystemExit: with `INTERRUPTED_EXIT_CODE` after a signal, when a whole checkpoint of the step in hand is written.
        FloatingPointError: the loss is not finite; names the step and the clips.
    """
    process = start_process(accelerator=config.accelerator, seed=config.seed)
    open_process_group(process)
    if process.is_main:
        make_demo_data(config.data_module)
    torch.distributed.barrier()
    run = _Run(config, run_dir, process)
    source = find_resume(config, run_dir)
    log = RunLog(run_dir, total_steps=run.total_steps, title=f"pretrain {config.modality}", enabled=process.is_main)
    with log, stop_signals() as stop_signal:
        _say_start(log, run)
        saved = None
        if source:
            run.resume(source)
            saved = source
            log.say(f"resumed {source} at epoch {run.at.epoch}, step {run.step}")
        while run.at.epoch < config.trainer.epochs:
            saved = _epoch(run, log, stop_signal) or saved
    run.engine.destroy()
    if saved is None:
        raise ValueError("nothing was trained: trainer.epochs is smaller than the epoch of the checkpoint resumed from")
    log.say(f"last checkpoint: {saved}")
    return saved


def _say_start(log: RunLog, run: _Run) -> None:
    if run.initialised:
        log.say(f"initialised from {run.initialised}")
    parameters = sum(p.numel() for p in run.engine.module.parameters())
    log.say(
        f"pretrain {run.config.modality}: {len(run.dataset)} clips, {run.batches} batches of {run.config.batch_size} "
        f"per process and epoch ({run.sampler.dropped} clips left out each epoch), {parameters:,} parameters, "
        f"base_lr {run.config.trainer.lr:g} -> lr {run.rates.lr:g}, device {run.process.device}, "
        f"target {run.spec.target}"
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
        torch.manual_seed(hash((run.config.seed, at.epoch, at.batch, run.process.rank)) % 2**63)
        loss, trivial = _train_step(run, batch)
        at.loss_sum += loss
        at.trivial_sum += trivial
        at.batch += 1
        clips += len(batch["index"]) * run.process.world_size
        rate = clips / (time.monotonic() - began)
        log.step(run.step, f"epoch {at.epoch} loss {loss:.4f} trivial {trivial:.4f} {rate:.0f} clips/s")
        boundary = at.batch % trainer.accumulate == 0
        if boundary and any_rank(stop_signal() is not None, run.process.device):
            name = f"epoch={at.epoch:02d}-loss={at.loss_sum / at.batch:.4f}-step={run.step}"
            path = run.save(name, at.loss_sum / at.batch)
            log.say(
                f"stopped by a signal; whole checkpoint written: {path}\ncontinue with resume={path} or resume=auto"
            )
            raise SystemExit(INTERRUPTED_EXIT_CODE)
        if at.batch >= run.batches:
            break
        asked = time.monotonic()
    seconds = time.monotonic() - began
    mean, trivial_mean = at.loss_sum / at.batch, at.trivial_sum / at.batch
    values = {
        "epoch": at.epoch,
        "loss": mean,
        "trivial_loss": trivial_mean,
        "lr": float(run.schedule.optimizer.param_groups[0]["lr"]),
        "clips_per_s": clips / seconds,
        "data_wait_percent": 100 * waited / seconds,
    }
    norm = run.engine.get_global_grad_norm()  # DeepSpeed knows it only where it clips
    if norm is not None:
        values["grad_norm"] = float(norm)
    log.scalars(run.step, values)
    log.say(
        f"epoch {at.epoch}: loss {mean:.4f}, trivial predictor {trivial_mean:.4f} (ratio {mean / trivial_mean:.3f}), "
        f"{clips / seconds:.1f} clips/s, data wait {100 * waited / seconds:.0f} %"
    )
    saved = None
    if (at.epoch + 1) % trainer.save_ckpt_freq == 0 or at.epoch + 1 == trainer.epochs:
        saved = run.save(f"epoch={at.epoch:02d}-loss={mean:.4f}", mean)
    at.restart()
    return saved


def _train_step(run: _Run, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Forward, backward, optimiser step; the losses averaged over ranks."""
    loss, trivial = run.losses(batch)
    mean, trivial_mean = mean_over_ranks([loss, trivial])
    if not math.isfinite(mean):
        names = ", ".join(run.dataset.index.clips[i].id for i in batch["index"].tolist())
        raise FloatingPointError(
            f"loss is {mean} at step {run.step} (epoch {run.at.epoch}); weights were not changed. Clips of rank "
            f"{run.process.rank}: {names}. Lower trainer.lr or set trainer.clip_grad"
        )
    run.engine.backward(loss)
    run.engine.step()
    done = run.at.epoch * run.batches + run.at.batch + 1
    if done % run.config.trainer.accumulate == 0:
        run.schedule.step_update(done // run.config.trainer.accumulate)
    return mean, trivial_mean
