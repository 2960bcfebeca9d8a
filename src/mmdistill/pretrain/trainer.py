"""The pretraining loop: one modality, any number of processes, exactly resumable.

All randomness is a pure function of (seed, epoch, clip) or (seed, epoch, batch, rank). A resumed run therefore needs no
generator state: it continues at the stored (epoch, batch) with the stored weights and moments. On a CPU it is
bit-identical to an uninterrupted run.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import record_function
from torch.utils.data import default_collate

from mmdistill.builders import make_decoder_config, make_encoder_config
from mmdistill.checkpoint import load_deepspeed, save_deepspeed
from mmdistill.checkpoint.errors import name_setting
from mmdistill.checkpoint.keys import ENCODER_EMA
from mmdistill.checkpoint.locate import existing_path
from mmdistill.checkpoint.references import inherited_sources, labeled_sources, labeled_sources_entry
from mmdistill.config import PretrainConfig, modality_specs, removes_no_token, to_plain, zero_stage
from mmdistill.data.masking import sample_decoder_tokens
from mmdistill.distributed.collectives import all_reduce_mean
from mmdistill.modalities import preprocess_clips
from mmdistill.models.flops import decoder_flops, encoder_training_flops, linear_flops
from mmdistill.models.joint import JointVideoMAE
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import VideoMAE, masked_indices
from mmdistill.pretrain.average import EncoderAverage, check_average
from mmdistill.pretrain.deepspeed import make_engine, skip_engine_step
from mmdistill.pretrain.initialization import load_videomae
from mmdistill.pretrain.joint import JointLoss, describe_terms, make_joint_loss, source_classes
from mmdistill.pretrain.monitor import Monitor
from mmdistill.randomness import seed_step, seed_torch, seeded_rng
from mmdistill.training.compatibility import convert_position, require_same_settings
from mmdistill.training.monitoring import is_due
from mmdistill.training.nonfinite import grad_norm, zero_loss
from mmdistill.training.old_checkpoints import upgrade_pretrain_state
from mmdistill.training.optim import StepSchedule
from mmdistill.training.run import Training, open_run, start_training
from mmdistill.training.run_logger import baseline_ratio
from mmdistill.training.train_data import make_train_data


def pretrain(config: PretrainConfig, run_dir: Path) -> Path:
    """Pretrain one VideoMAE; checkpoints are ``checkpoints/epoch=XX-loss=X.XXXX`` in `run_dir`.

    Returns:
        The last checkpoint directory; that of a run that resumes from a checkpoint of the last epoch is this one.

    Raises:
        ConfigError: there are fewer clips than one optimizer step needs, nothing is to be reconstructed, or see
            `Training.load_state_dict`.
        SystemExit: with `INTERRUPTED_EXIT_CODE` after a signal, when a complete checkpoint is written.
        NonFiniteError: a loss or gradient is not finite; names the step and the clips.
    """
    if config.init_from:
        with name_setting("init_from"):
            existing_path(config.init_from)  # before the demo data are rendered
    with open_run(config, run_dir) as run:
        data = make_train_data(config, (config.modality,), run.process, whole_steps=True)
        title = f"pretrain {config.modality}"
        joint = make_joint_loss(config, data.source)
        compat = _weight_compat(config) | (joint.weight_compat if joint else {})
        with start_training(config, run, data, title=title, weight_compat=compat) as training:
            return PretrainTrainer(config, training, joint).fit()


def _weight_compat(config: PretrainConfig) -> dict[str, Any]:
    """Settings that must match on resume; most of them do not affect tensor shapes."""
    spec = modality_specs(config.data_module)[config.modality]
    encoder = to_plain(make_encoder_config(config.model, config.data_module, spec))
    return {**encoder, "decoder": to_plain(make_decoder_config(config.model)), **spec.statistics}


class PretrainTrainer:
    """One pretraining run: model, DeepSpeed engine, schedule and loop. `joint`: the loss with a source."""

    def __init__(self, config: PretrainConfig, training: Training, joint: JointLoss | None = None) -> None:
        self.config, self.training, self.joint = config, training, joint
        self.run, self.data, self.state = training.run, training.data, training.state
        self.spec = modality_specs(config.data_module)[config.modality]
        self.encoder_config = make_encoder_config(config.model, config.data_module, self.spec)
        self.decoder_config = make_decoder_config(config.model)
        seed_torch(config.seed)
        model = self.make_model()
        model.encoder.set_activation_checkpointing(config.trainer.activation_checkpointing)
        if config.compile:
            model.encoder.compile(dynamic=False)
            model.decoder.compile(dynamic=False)
        self.load_report = load_videomae(model.encoder, config.init_from) if config.init_from else None
        self.optimization = training.optimization
        self.engine = make_engine(config, model, self.optimization, self.run)
        self.schedule = StepSchedule(
            self.engine.optimizer if zero_stage(config) else self.engine.basic_optimizer, self.optimization
        )
        ema, every = config.trainer.ema, config.trainer.check_val_every_n_epoch
        self.average = None if ema is None else EncoderAverage(model, model.encoder, ema)
        self.inherited = inherited_sources(config.init_from, self.run.resumed)
        learned = labeled_sources(self._sources_meta)
        self.monitor = Monitor(config, training, model.encoder, learned) if every else None

    def make_model(self) -> VideoMAE:
        """The masked autoencoder, with a classifier if the loss needs it."""
        sizes, drop_path = (self.encoder_config, self.decoder_config), self.config.model.drop_path
        if self.joint is None or not self.joint.num_classes:
            return VideoMAE(*sizes, drop_path=drop_path)
        dropout = self.config.trainer.classifier_dropout
        return JointVideoMAE(*sizes, num_classes=self.joint.num_classes, dropout=dropout, drop_path=drop_path)

    def fit(self) -> Path:
        """Train all epochs; returns the last checkpoint. See `pretrain` for the errors."""
        checkpoint = self.run.source
        if checkpoint:
            self.resume(checkpoint)
            self.training.finish_save()  # the save of this checkpoint may have been killed before its end
        self.log_start()
        while self.state.epoch < self.config.trainer.epochs:
            self.train_epoch()
            self.log_epoch()
            checkpoint = self.end_epoch() or checkpoint
            self.state.start_epoch(self.state.epoch + 1)
        assert checkpoint is not None  # the last epoch is always saved, and trainer.epochs is positive
        self.training.log_end(checkpoint)
        self.engine.destroy()
        return checkpoint

    def train_epoch(self) -> None:
        """Train to the end of the current epoch, or stop after a signal with a checkpoint."""
        state, training, process = self.state, self.training, self.run.process
        self.engine.train()
        self.data.sampler.set_state(state.epoch, state.batch)
        training.throughput.restart()
        for batch in self.data.loader:
            training.throughput.end_wait()
            seed_step(self.config.seed, state.epoch, state.batch, process.rank)
            losses = self.train_step(batch)
            num_clips = len(batch["index"]) * process.world_size
            state.add_batch(losses, num_clips)
            training.end_batch(num_clips)
            note = "loss {loss:.4f} constant baseline {constant_baseline_loss:.4f}".format(**losses) if losses else None
            training.log_step(note or "loss not finite")
            if state.batch >= self.data.batches_per_epoch:
                return
            if state.batch % self.data.accumulate_grad_batches == 0 and training.should_stop():
                training.stop(self.save(f"-step={state.step}"))

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Forward and backward pass of one batch, and the optimizer step after the last batch of a step.

        Returns:
            ``loss`` and the values of `losses`, means over all ranks; empty if the loss is not finite.
        """
        accumulate, position = self.data.accumulate_grad_batches, self.state.batch
        loss, values = self.losses(batch)
        means = dict(zip(("loss", *values), all_reduce_mean([loss, *values.values()]), strict=True))
        clips, is_first = self.data.clip_numbers(batch), position % accumulate == 0
        is_finite = self.training.guard.before_backward(loss, means["loss"], clips, is_first=is_first)
        with record_function("backward"):
            self.engine.backward(loss if is_finite else zero_loss(list(self.engine.module.parameters())))
        self.optimizer_step(is_last=(position + 1) % accumulate == 0)
        return means if is_finite else {}

    @record_function("forward")
    def losses(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one batch, and by name its constant baseline and, with a source, its terms; float32 scalars."""
        device, g = self.run.process.device, self.encoder_config
        with record_function("transfer"):
            clip = batch[self.config.modality].to(device, non_blocking=True)
            visible = batch["visible"].to(device, non_blocking=True)
        x = preprocess_clips(clip, batch["crop_box"], self.spec, (g.height, g.width))
        targets = self._decoder_targets(visible, batch["index"].tolist())
        if self.joint is not None:
            return self.joint(self.engine, x, batch["source"], visible, targets)
        dtype = next(self.engine.module.parameters()).dtype
        prediction, predicted = self.engine(x.to(dtype), visible, targets)
        target = patch_targets(x, predicted, g.grid, target=self.spec.target)
        constant_baseline = constant_baseline_loss(target, g.channels)
        return reconstruction_loss(prediction, target), {"constant_baseline_loss": constant_baseline}

    def _decoder_targets(self, visible: torch.Tensor, clips: list[int]) -> torch.Tensor | None:
        """Indices of the tokens to reconstruct if decoder_mask_ratio is set, (B, L); None: all removed tokens."""
        ratio = self.config.decoder_mask_ratio
        if ratio == 0:
            return None
        removed = masked_indices(visible, self.encoder_config.num_tokens)
        key = (self.config.seed, self.state.epoch, "predicted")
        chosen = [sample_decoder_tokens(removed.shape[1], ratio=ratio, rng=seeded_rng(*key, clip)) for clip in clips]
        return removed.gather(1, torch.from_numpy(np.stack(chosen)).to(removed.device, non_blocking=True))

    @record_function("optimizer")
    def optimizer_step(self, *, is_last: bool) -> None:
        """DeepSpeed's step after each batch, because it counts them; after the last one also the schedule's step."""
        engine, guard = self.engine, self.training.guard
        if not is_last:
            engine.step()
            return
        # at stage 0 in float32 the gradients are in `Parameter.grad`; otherwise DeepSpeed's optimizer holds them
        has_grads = zero_stage(self.config) == 0 and self.run.precision == "32"
        must_skip = guard.before_step(grad_norm(list(engine.module.parameters())) if has_grads else None)
        skipped_before, loss_scale = engine.skipped_steps, self.loss_scale
        with skip_engine_step(engine) if must_skip else nullcontext():
            engine.step()
        if not has_grads:
            was_skipped = engine.skipped_steps > skipped_before
            guard.after_step(engine.get_global_grad_norm(), was_skipped=was_skipped, loss_scale=loss_scale)
        if self.average is not None and not guard.was_skipped:
            self.average.update()
        self.state.step += 1
        self.schedule.step_update(self.data.schedule_step(self.state) + 1)

    @property
    def loss_scale(self) -> float | None:
        """The dynamic loss scale of precision=16."""
        return float(self.engine.optimizer.loss_scale) if self.run.precision == "16" else None

    @property
    def flops_per_clip(self) -> int:
        """FLOPs of a training step per clip of `data_module`; with a source, those of its clip are included."""
        g, joint, ratio = self.encoder_config, self.joint, self.config.decoder_mask_ratio
        num_visible = self.data.dataset.mask.num_visible
        num_removed, recomputes = g.num_tokens - num_visible, self.config.trainer.activation_checkpointing
        num_predicted = len(sample_decoder_tokens(num_removed, ratio=ratio, rng=seeded_rng(0)))
        flops = encoder_training_flops(g, num_visible, recomputes=recomputes)
        if num_removed:
            decoder = decoder_flops(g, self.decoder_config, num_visible, num_predicted)
            flops += decoder if joint and not joint.reconstructed else 3 * decoder
        if joint is None:
            return flops
        return joint.clips_per_target * flops + 3 * linear_flops(1, g.dim, joint.num_classes)

    def log_start(self) -> None:
        """Log what the run trains."""
        if self.load_report:
            self.training.log.info(f"initialized from {self.load_report}")
        joint = f"; {self.joint}" if self.joint else ""
        monitor = self.monitor.summary if self.monitor else ""
        self.training.flops_per_clip = self.flops_per_clip
        title, target = f"pretrain {self.config.modality}", f", target {self.spec.target}{joint}{monitor}"
        self.training.log_start(title, self.engine.module, target)

    @property
    def means(self) -> dict[str, float]:
        """Mean losses of the epoch so far; NaN before the first finite batch."""
        return self.state.means or {"loss": math.nan, "constant_baseline_loss": math.nan}

    def log_epoch(self) -> None:
        """Log the epoch's metrics, those of held-out clips, and an image, each as often as configured. Collective."""
        if self.monitor is not None and is_due(self.config.trainer.check_val_every_n_epoch, self.state.epoch):
            with self.training.throughput.pause():
                self.training.extra_metrics |= self.monitor.measure(self.engine.module)
        loss, baseline = self.means["loss"], self.means["constant_baseline_loss"]
        text = (
            f"loss {loss:.4f} (constant baseline {baseline:.4f}, ratio {baseline_ratio(loss, baseline):.3f}, lower is "
            f"better){describe_terms(self.means)}"
        )
        self.training.log_epoch(self.means, text, lr=self.schedule.lr, loss_scale=self.loss_scale)
        every_n, epochs_done = self.config.trainer.image_every_n_epochs, self.state.epoch + 1
        if removes_no_token(self.config.data_module):
            return  # nothing is reconstructed
        if every_n and (epochs_done % every_n == 0 or epochs_done == self.config.trainer.epochs):
            self._log_reconstruction()

    def _log_reconstruction(self) -> None:
        """An image of the reconstruction of the first clip, with the same mask each time. Collective."""
        from mmdistill.pretrain.visualization import draw, reconstruct, write_png

        dataset, epoch = self.data.dataset, self.state.epoch
        reconstruction = reconstruct(self.engine.module, default_collate([dataset[0]]), self.spec)
        if self.run.process.is_main:
            image = draw(reconstruction, f"{self.config.modality}, epoch {epoch}, {dataset.index.clips[0].id}")
            write_png(image, self.run.directory / "images" / f"epoch={epoch:02d}.png")
            self.training.log.log_image(self.state.step, "reconstruction", image)

    def end_epoch(self) -> Path | None:
        """Save every `save_ckpt_freq` epochs and after the last one, or stop after a signal. Collective."""
        trainer, epochs_done = self.config.trainer, self.state.epoch + 1
        is_last = epochs_done == trainer.epochs
        must_stop = not is_last and self.training.should_stop()
        if not (must_stop or is_last or epochs_done % trainer.save_ckpt_freq == 0):
            return None
        checkpoint = self.save()
        if must_stop:
            self.training.stop(checkpoint)
        return checkpoint

    def save(self, suffix: str = "") -> Path:
        """Write the checkpoint directory ``epoch=XX-loss=X.XXXX{suffix}``, then prune old ones. Collective.

        `suffix` is not empty inside an epoch, whose mean loss is not comparable.
        """
        loss = self.means["loss"]
        path = self.run.checkpoints / f"epoch={self.state.epoch:02d}-loss={loss:.4f}{suffix}"
        if not suffix:
            self.state.losses[str(path)] = loss
        statistics = {self.config.modality: self.spec.statistics}
        encoders = dict.fromkeys(["encoder", *([ENCODER_EMA] if self.average else [])], self.encoder_config)
        meta: dict[str, Any] = {
            **self.training.meta("pretrain", encoders, statistics),
            "modality": self.config.modality,
            "decoder": to_plain(self.decoder_config),
            "loss": loss,
            **self._sources_meta,
        }
        save_deepspeed(self.engine, path, meta, self.training.state_dict())
        self.training.finish_save()
        return path

    @property
    def _sources_meta(self) -> dict[str, Any]:
        """Metadata of the labeled sources of this training and of the weights that it started from."""
        own = {"source": self.joint.meta} if self.joint else {}
        return {**own, **labeled_sources_entry(self.inherited)}

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint directory. Learning rates, weight decay, betas and clipping are those of this run.

        ZeRO stage and number of processes may be others, and inside an epoch also the number of accumulated batches, if
        the clips of an optimizer step stay the same.

        Raises:
            CheckpointError: only one of checkpoint and run has an average of the encoder.
            ConfigError: see `check_compatible`.
        """
        meta = self.run.resumed.stored_meta if self.run.resumed else {}
        check_average(meta, self.config.trainer.ema)
        # before the tensors, whose shapes depend on the number of classes
        own = source_classes(self.joint.meta if self.joint else None)
        require_same_settings(source_classes(meta.get("source")), own, path)
        stored = upgrade_pretrain_state(load_deepspeed(self.engine, path))
        stored = convert_position({"overflow_steps": self.engine.skipped_steps, **stored}, self.data.order)
        self.training.load_state_dict(stored)
        self.schedule.restore(self.data.schedule_step(self.state))
        if hasattr(self.engine.optimizer, "clip_grad"):  # stages 1 and 2 have loaded that of the checkpoint
            self.engine.optimizer.clip_grad = self.config.trainer.clip_grad or 0.0
