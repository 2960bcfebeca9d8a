"""The LightningModule: three frozen teachers, one RGB student, one transfer head.

MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.3): student and teachers get the same visible tokens of
the same clip. The loss is the sum over teachers of the mean squared error between the transfer head's output and the
teacher's feature.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mmdistill.checkpoint import CheckpointError
from mmdistill.config import ConfigError
from mmdistill.distill.parallel_encoders import MAX_TOKENS_FOR_THREADING, run_in_parallel
from mmdistill.distill.teacher_cache import TeacherCache
from mmdistill.distill.teachers import check_teacher_digests
from mmdistill.distributed.collectives import all_reduce_mean
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, preprocess_clips
from mmdistill.models.transfer_head import CrossModalTransfer
from mmdistill.models.videomae import Encoder
from mmdistill.training.nonfinite import MIN_LOSS_SCALE, NonFiniteGuard, grad_norm, skip_optimizer_step, zero_loss
from mmdistill.training.optim import LearningRates, make_optimizer, make_schedule, param_group_hparams


class MMDistill(pl.LightningModule):
    """Student, teachers and transfer head; keys ``student_rgb.encoder.*``, ``teacher_flow.encoder.*``, ``cmt.*`` ....

    Args:
        teachers: frozen encoders by modality. ``rgb`` is required: the student is initialized as its copy.
        specs: preprocessing of each modality's raw clips.
        rates: learning rates of the schedule.
        weight_decay: weight decay of AdamW.
        betas: betas of AdamW.
        warmup_steps: optimizer steps of the linear warm-up.
        total_steps: optimizer steps of the whole schedule.
        meta: plain containers that are stored with the weights (architectures, statistics, teachers with digests).
        save_teachers: False: checkpoints do not contain the teachers; `meta` references them.
        layer_decay: see `make_optimizer`.
        ema: decay per optimizer step of an average of the student, component ``student_ema_rgb``; None: no average.
        nonfinite: policy for a loss or gradient that is not finite; None: raise.
    """

    def __init__(
        self,
        teachers: Mapping[str, Encoder],
        specs: Mapping[str, ModalitySpec],
        *,
        rates: LearningRates,
        weight_decay: float,
        betas: tuple[float, float],
        warmup_steps: int,
        total_steps: int,
        meta: Mapping[str, Any],
        save_teachers: bool = True,
        layer_decay: float | None = None,
        ema: float | None = None,
        nonfinite: NonFiniteGuard | None = None,
    ) -> None:
        super().__init__()
        self.nonfinite = nonfinite or NonFiniteGuard("raise", 0, print)
        self.grad_norm = 0.0  # of the last step, before clipping
        self._num_finite_batches = 0  # of the current optimizer step
        self.overflow_steps = 0  # under precision=16: steps skipped to find the loss scale
        self._step_was_skipped = False
        self._step_context = ExitStack()  # entered during the optimizer step
        self.save_teachers = save_teachers
        self.specs, self.rates, self.meta = dict(specs), rates, dict(meta)
        self.weight_decay, self.betas, self.layer_decay = weight_decay, betas, layer_decay
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self._group_hparams: list[dict[str, Any]] = []  # of the optimizer's param groups
        # position in the schedule, less `global_step`; not 0 if earlier epochs had another number of steps
        self._step_offset = 0
        self.modalities = tuple(teachers)
        self.student_rgb = nn.ModuleDict({"encoder": copy.deepcopy(teachers[STUDENT_MODALITY])})
        self.student_rgb.requires_grad_(True)
        for modality, encoder in teachers.items():
            teacher = nn.ModuleDict({"encoder": encoder}).requires_grad_(False).eval()
            self.add_module(f"teacher_{modality}", teacher)
        self.ema = ema
        if ema is not None:
            self.student_ema_rgb = copy.deepcopy(self.student_rgb).requires_grad_(False).eval()
        self.cache: TeacherCache | None = None
        self._is_compiled = False
        widths = {m: e.config.dim for m, e in teachers.items()}
        self.cmt = CrossModalTransfer(teachers[STUDENT_MODALITY].config.dim, widths)

    def train(self, mode: bool = True) -> "MMDistill":
        """Set the mode of the student and the transfer head; teachers and average stay in eval mode."""
        super().train(mode)
        for modality in self.modalities:
            self.teacher(modality).eval()
        if self.ema is not None:
            self.student_ema_rgb.eval()
        return self

    def compile_encoders(self) -> None:
        """Compile student and teachers with torch.compile at their next call. Parameter names do not change."""
        self._is_compiled = True
        for encoder in (self.student, *map(self.teacher, self.modalities)):
            encoder.compile(dynamic=False)

    @property
    def student(self) -> Encoder:
        """The encoder that is trained and evaluated."""
        return cast(Encoder, self.student_rgb["encoder"])

    def teacher(self, modality: str) -> Encoder:
        """The frozen teacher of a modality."""
        return cast(Encoder, self.get_submodule(f"teacher_{modality}.encoder"))

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """By teacher: (mean squared error, that of the best constant feature on this batch); float32 scalars."""
        visible, rgb = batch["visible"], self.input(STUDENT_MODALITY, batch)

        def encode_student() -> Tensor:
            return self.student.embed(rgb, visible)

        if self.cache is not None and self.cache.is_cached(self.current_epoch):
            targets, feature = self.cache.features(self.current_epoch, batch["index"]), encode_student()
        else:
            *teacher_features, feature = self._run_jobs([*self._teacher_jobs(batch, rgb), encode_student], visible)
            targets = dict(zip(self.modalities, teacher_features, strict=True))
            if self.cache is not None:
                self.cache.add(self.current_epoch, batch["index"], targets)
        predictions = self.cmt(feature)
        return {
            m: (F.mse_loss(predictions[m].float(), targets[m]), targets[m].var(dim=0, unbiased=False).mean())
            for m in self.modalities
        }

    def input(self, modality: str, batch: Mapping[str, Tensor]) -> Tensor:
        """The preprocessed clips of a modality, (B, C, T, h, w)."""
        g = self.teacher(modality).config
        return preprocess_clips(batch[modality], batch["crop_box"], self.specs[modality], (g.height, g.width))

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teachers' features by modality, (B, D) float32 each.

        A placeholder job replaces the student's: with the same number of jobs each job gets the same number of threads,
        so the features are bit-identical to those of a training step.
        """
        visible = batch["visible"]
        jobs = [*self._teacher_jobs(batch, self.input(STUDENT_MODALITY, batch)), lambda: visible]
        *teacher_features, _ = self._run_jobs(jobs, visible)
        return dict(zip(self.modalities, teacher_features, strict=True))

    def _teacher_jobs(self, batch: Mapping[str, Tensor], rgb: Tensor) -> list[Callable[[], Tensor]]:
        """One job per teacher, in the order of `modalities`, that computes its feature. `rgb` is preprocessed."""

        @torch.no_grad()
        def encode_teacher(modality: str) -> Tensor:
            x = rgb if modality == STUDENT_MODALITY else self.input(modality, batch)
            return self.teacher(modality).embed(x, batch["visible"]).float()

        return [partial(encode_teacher, modality) for modality in self.modalities]

    def _run_jobs(self, jobs: Sequence[Callable[[], Tensor]], visible: Tensor) -> list[Tensor]:
        """The results of independent `jobs` that encode the tokens `visible`; in parallel if that is faster."""
        # torch.compile does not support several threads; a recomputed block needs the same number of threads again
        must_be_sequential = self._is_compiled or self.student.checkpoint_activations
        if self.device.type != "cpu" or visible.numel() > MAX_TOKENS_FOR_THREADING or must_be_sequential:
            return [job() for job in jobs]
        return run_in_parallel(jobs)

    def _update_average(self) -> None:
        """Update the student's average after an optimizer step."""
        averages, current = list(self.student_ema_rgb.parameters()), list(self.student_rgb.parameters())
        if averages[0].dtype != torch.float32:  # rounding would discard small updates
            raise ConfigError("trainer.ema needs float32 weights: with strategy=deepspeed set precision=32")
        get_ema_multi_avg_fn(self.ema or 0)(averages, [p.detach() for p in current], None)

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> dict[str, Any]:
        """The sum of the teachers' losses as ``loss``; each loss and its constant baseline in ``values``."""
        losses = self.losses(batch)
        total = torch.stack([loss for loss, _ in losses.values()]).sum()
        mean = all_reduce_mean([total])[0]
        accumulate = self.trainer.accumulate_grad_batches
        is_finite = self.nonfinite.check_loss(total, mean, self.clip_ids(batch), self._step_name)
        self._num_finite_batches = is_finite + (0 if batch_index % accumulate == 0 else self._num_finite_batches)
        if not is_finite:  # DDP and DeepSpeed need a backward pass on every rank and for every batch
            return {"loss": zero_loss(list(self.parameters())), "values": {}}
        values = {"train_loss": total}
        for modality, (loss, constant_baseline) in losses.items():
            values[f"train_loss_{modality}"] = loss
            values[f"constant_baseline_loss_{modality}"] = constant_baseline
        return {"loss": total, "values": values}

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """The student's features of clips without a mask, (B, D); `Validation` scores them."""
        return self.student.embed(self.input(STUDENT_MODALITY, batch), None)

    def clip_ids(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Ids of a batch's clips."""
        clips = self.trainer.datamodule.dataset.index.clips  # type: ignore[attr-defined]
        return [clips[i].id for i in batch["index"].tolist()]

    @property
    def _step_name(self) -> str:
        """Step and epoch, for messages."""
        return f"step {self.global_step} (epoch {self.current_epoch})"

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Compute the gradient norm before clipping; skip the step if the loss or the gradient is not finite.

        Raises:
            NonFiniteError: the policy does not allow to skip this step.
        """
        reason = None if self._num_finite_batches else "loss is not finite"
        self._step_was_skipped = reason is not None
        strategy: Any = self.trainer.strategy
        is_deepspeed = isinstance(strategy, DeepSpeedStrategy)
        if reason is None and not (is_deepspeed and strategy.stage):  # ZeRO keeps gradients in buckets
            self.grad_norm = grad_norm(list(self.parameters()))
            if not math.isfinite(self.grad_norm):
                self._step_was_skipped = True
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # skips such a step by itself
                if scaler is not None:
                    self.overflow_steps += 1
                if scaler is None or scaler.get_scale() <= MIN_LOSS_SCALE:
                    reason = "gradient is not finite"
        if reason:
            if is_deepspeed:
                self._step_context.enter_context(skip_optimizer_step(optimizer))
            else:  # this hook runs inside AdamW's step, which ignores parameters without a gradient
                for parameter in self.parameters():
                    parameter.grad = None
            self.nonfinite.skip_step(self._step_name, reason=reason)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's step. ZeRO reports the gradient norm, and a step that it skips is counted.

        Raises:
            NonFiniteError: see `on_before_optimizer_step`.
        """
        engine = getattr(self.trainer.strategy, "deepspeed_engine", None)
        skipped_before = engine.skipped_steps if engine else 0
        with self._step_context:
            super().optimizer_step(*args, **kwargs)
        if engine and engine.zero_optimization_stage() and self._num_finite_batches:
            self.grad_norm = float(engine.get_global_grad_norm())
        if engine and engine.skipped_steps > skipped_before and not self._step_was_skipped:
            self._step_was_skipped = True
            self.nonfinite.skip_step(self._step_name, reason="gradient is not finite")

    def configure_optimizers(self) -> Any:
        """AdamW on student and transfer head, with a cosine schedule by step."""
        trainable = nn.ModuleDict({"student_rgb": self.student_rgb, "cmt": self.cmt})
        optimizer = make_optimizer(
            trainable, lr=self.rates.lr, weight_decay=self.weight_decay, betas=self.betas, layer_decay=self.layer_decay
        )
        # otherwise a fused AdamW unscales fp16 gradients inside its step, after they are checked and clipped
        optimizer._step_supports_amp_scaling = False
        self._group_hparams = param_group_hparams(optimizer)
        schedule = make_schedule(optimizer, self.rates, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def restore_schedule(self, epoch: int, batch: int) -> None:
        """Set learning rates, weight decay and betas of this position from this run's config, not the checkpoint."""
        accumulate = self.trainer.accumulate_grad_batches
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / accumulate)
        self._step_offset = epoch * steps_per_epoch + batch // accumulate - self.global_step
        for scheduler_config in self.trainer.lr_scheduler_configs:
            schedule: Any = scheduler_config.scheduler
            for group, hparams in zip(schedule.optimizer.param_groups, self._group_hparams, strict=True):
                group.update(hparams)
            schedule.step_update(self.global_step + self._step_offset)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """After each optimizer step: update timm's schedule with the number of steps done, and the average."""
        scheduler.step_update(self.global_step + self._step_offset)
        # not in a hook at the end of the batch, which does not run if a signal stops the training there
        if self.ema is not None and not self._step_was_skipped:
            self._update_average()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add `meta` with epoch, step and loss; remove the teachers if `save_teachers` is False.

        ``batch`` is the number of batches done in the epoch, None at its end. ``loss`` is None inside an epoch.
        """
        _, batch = training_position(self.trainer)
        loss = None if batch else self.trainer.callback_metrics.get("train_loss")
        checkpoint["mmdistill"] = {
            **self.meta,
            "epoch": self.current_epoch,
            "step": self.global_step,
            "batch": batch or None,
            "skipped_steps": self.nonfinite.skipped_steps,
            "overflow_steps": self.overflow_steps,
            "loss": float(loss) if loss is not None else None,
        }
        # Lightning's loader state does not load into a loader without state; `DistillData` stores the position
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        if not self.save_teachers:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher_")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add this module's teachers to a student-only checkpoint, if their digests match.

        Raises:
            CheckpointError: the digests differ; or only one of checkpoint and run has an average of the student.
        """
        state, stored = checkpoint.get("state_dict"), checkpoint.get("mmdistill") or {}
        self.nonfinite.skipped_steps = int(stored.get("skipped_steps", 0))
        self.overflow_steps = int(stored.get("overflow_steps", 0))
        checkpoint["lr_schedulers"] = []  # the schedule follows from config and step, see `restore_schedule`
        if state is None:  # a directory of Lightning's own DeepSpeed strategy: the engine has loaded the weights
            return
        has_average = any(k.startswith("student_ema_rgb.") for k in state)
        if has_average != (self.ema is not None):
            raise CheckpointError(
                f"the checkpoint has {'an' if has_average else 'no'} average of the student (student_ema_rgb), this "
                f"run has trainer.ema={'null' if self.ema is None else self.ema}; use the same setting, or resume=null"
            )
        teachers = [f"teacher_{m}" for m in self.modalities]
        missing = [name for name in teachers if not any(k.startswith(f"{name}.") for k in state)]
        check_teacher_digests(stored.get("teachers") or {}, self.meta.get("teachers") or {}, missing)
        own_teachers = {k: v for k, v in self.state_dict().items() if k.partition(".")[0] in missing}
        checkpoint["state_dict"] = {**state, **own_teachers}


def training_position(trainer: pl.Trainer) -> tuple[int, int]:
    """The position between two batches: (epoch, batches done in it); (next epoch, 0) at the end of an epoch."""
    loop: Any = trainer.fit_loop
    epochs_started, done = loop.epoch_progress.current.started, loop.epoch_loop.batch_progress.current.ready
    return (epochs_started - 1, done) if 0 < done < trainer.num_training_batches else (epochs_started, 0)
