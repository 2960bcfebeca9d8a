"""The LightningModule: three frozen teachers, one RGB student, one transfer head.

MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.3): student and teachers see the same visible tokens of
the same clip; the loss is the sum over teachers of the mean squared error between the transfer head's output and the
teacher's feature.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DeepSpeedStrategy
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from mmdistill.checkpoint import CheckpointError
from mmdistill.config import ConfigError
from mmdistill.distill.parallel_encoders import MAX_TOKENS_FOR_THREADING, run_in_parallel
from mmdistill.distill.teacher_cache import TeacherCache
from mmdistill.distill.teachers import check_teachers
from mmdistill.distributed.collectives import all_reduce_mean
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, preprocess_clips
from mmdistill.models.transfer_head import CrossModalTransfer
from mmdistill.models.videomae import Encoder
from mmdistill.training.nonfinite import MIN_LOSS_SCALE, NonFiniteGuard, frozen, grad_norm, zero_loss
from mmdistill.training.optim import LearningRates, make_optimizer, make_schedule, param_group_hparams


class MMDistill(pl.LightningModule):
    """Student, teachers and transfer head; keys ``student_rgb.encoder.*``, ``teacher_flow.encoder.*``, ``cmt.*`` ....

    Args:
        teachers: frozen encoders by modality; must hold ``rgb``, which the student starts as a copy of.
        specs: how each modality's raw clips become input.
        rates: learning rates of the schedule.
        weight_decay, betas: of AdamW.
        warmup_steps, total_steps: optimiser steps of the linear warm-up and of the whole schedule.
        meta: plain containers that travel with the weights (geometries, statistics, teachers' names and digests).
        save_teachers: False leaves the teachers out of checkpoints; `meta` names them.
        layer_decay: see `make_optimizer`.
        ema: decay per optimiser step of an average of the student, part ``student_ema_rgb``; None: no such part.
        nonfinite: what happens when a loss or a gradient is not finite; None: it raises.
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
        self._usable = 0  # batches of the optimiser step at hand with a finite loss
        self.overflow_steps = 0  # under precision=16: steps left out to find the loss scale
        self._skipped = False  # whether the last step was left out, for whatever reason
        self._step = ExitStack()  # open while the optimiser steps
        self.save_teachers = save_teachers
        self.specs, self.rates, self.meta = dict(specs), rates, dict(meta)
        self.weight_decay, self.betas, self.layer_decay = weight_decay, betas, layer_decay
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self._settings: list[dict[str, Any]] = []  # of the optimiser's groups
        self._ahead = 0  # steps by this run's epochs, less those counted: epochs done in another number of steps
        self.modalities = tuple(teachers)
        self.student_rgb = nn.ModuleDict({"encoder": copy.deepcopy(teachers[STUDENT_MODALITY])})
        self.student_rgb.requires_grad_(True)
        for modality, encoder in teachers.items():
            frozen = nn.ModuleDict({"encoder": encoder}).requires_grad_(False).eval()
            self.add_module(f"teacher_{modality}", frozen)
        self.ema = ema
        if ema is not None:
            self.student_ema_rgb = copy.deepcopy(self.student_rgb).requires_grad_(False).eval()
        self.cache: TeacherCache | None = None
        self._compiled = False
        widths = {m: e.config.dim for m, e in teachers.items()}
        self.cmt = CrossModalTransfer(teachers[STUDENT_MODALITY].config.dim, widths)

    def train(self, mode: bool = True) -> "MMDistill":
        """Teachers stay in eval mode whatever is asked."""
        super().train(mode)
        for modality in self.modalities:
            self.teacher(modality).eval()
        if self.ema is not None:
            self.student_ema_rgb.eval()
        return self

    def compile_encoders(self) -> None:
        """torch.compile of student and teachers, at their next call; names and weights stay as they are."""
        self._compiled = True
        for encoder in (self.student, *map(self.teacher, self.modalities)):
            encoder.compile(dynamic=False)

    @property
    def student(self) -> Encoder:
        """The network that is trained and scored."""
        encoder: Encoder = self.student_rgb["encoder"]
        return encoder

    def teacher(self, modality: str) -> Encoder:
        """A frozen teacher."""
        encoder: Encoder = self.get_submodule(f"teacher_{modality}.encoder")
        return encoder

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Per teacher: (mean squared error, error of the best constant feature on this batch); float32 scalars."""
        visible, rgb = batch["visible"], self.input(STUDENT_MODALITY, batch)

        def student() -> Tensor:
            return self.student.embed(rgb, visible)

        if self.cache is not None and self.cache.serves(self.current_epoch):
            targets, feature = self.cache.features(self.current_epoch, batch["index"]), student()
        else:
            *found, feature = self._run([*self._teacher_jobs(batch, rgb), student], visible)
            targets = dict(zip(self.modalities, found, strict=True))
            if self.cache is not None:
                self.cache.add(self.current_epoch, batch["index"], targets)
        predictions = self.cmt(feature)
        return {
            m: (F.mse_loss(predictions[m].float(), targets[m]), targets[m].var(dim=0, unbiased=False).mean())
            for m in self.modalities
        }

    def input(self, modality: str, batch: Mapping[str, Tensor]) -> Tensor:
        """A modality of a batch, as its teacher takes it. (B, C, T, h, w)"""
        g = self.teacher(modality).config
        return preprocess_clips(batch[modality], batch["crop_box"], self.specs[modality], (g.height, g.width))

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teachers' features, by modality. (B, D) float32 each

        Something stands in for the student, so that they are a training step's to the last bit.
        """
        visible = batch["visible"]
        *found, _ = self._run(
            [*self._teacher_jobs(batch, self.input(STUDENT_MODALITY, batch)), lambda: visible], visible
        )
        return dict(zip(self.modalities, found, strict=True))

    def _teacher_jobs(self, batch: Mapping[str, Tensor], rgb: Tensor) -> list[Callable[[], Tensor]]:
        """What computes each teacher's feature, in the order of `modalities`; `rgb` is the input of that one."""

        @torch.no_grad()
        def feature(modality: str) -> Tensor:
            x = rgb if modality == STUDENT_MODALITY else self.input(modality, batch)
            return self.teacher(modality).embed(x, batch["visible"]).float()

        return [partial(feature, modality) for modality in self.modalities]

    def _run(self, jobs: Sequence[Callable[[], Tensor]], visible: Tensor) -> list[Tensor]:
        """The results of independent `jobs`, which encode the tokens `visible`."""
        few = visible.numel() <= MAX_TOKENS_FOR_THREADING
        # torch.compile is not for several threads, and a recomputed block must find as many as it had
        alone = self._compiled or self.student.checkpoint_activations
        if self.device.type != "cpu" or not few or alone:
            return [job() for job in jobs]
        return run_in_parallel(jobs)

    def _average(self) -> None:
        """Move the student's average after an optimiser step."""
        averages, current = list(self.student_ema_rgb.parameters()), list(self.student_rgb.parameters())
        if averages[0].dtype != torch.float32:  # steps of a small rate would be lost in rounding
            raise ConfigError("trainer.ema needs float32 weights: with strategy=deepspeed set precision=32")
        with torch.no_grad():
            torch._foreach_lerp_(averages, [p.detach() for p in current], 1 - (self.ema or 0))

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> dict[str, Any]:
        """The sum of the teachers' losses as ``loss``; each of them, and its trivial predictor's, in ``values``."""
        losses = self.losses(batch)
        total = torch.stack([loss for loss, _ in losses.values()]).sum()
        mean = all_reduce_mean([total])[0]
        accumulate = self.trainer.accumulate_grad_batches
        usable = self.nonfinite.check_loss(total, mean, self.clip_names(batch), self._where)
        self._usable = usable + (0 if batch_index % accumulate == 0 else self._usable)
        if not usable:  # a backward pass all the same: DDP's ranks and DeepSpeed's engine count them
            return {"loss": zero_loss(list(self.parameters())), "values": {}}
        values = {"train_loss": total}
        for modality, (loss, trivial) in losses.items():
            values[f"train_loss_{modality}"] = loss
            values[f"trivial_loss_{modality}"] = trivial
        return {"loss": total, "values": values}

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """The student's features of whole clips, (B, D); `distill.validate` scores them."""
        g = self.student.config
        return self.student.embed(
            preprocess_clips(
                batch[STUDENT_MODALITY], batch["crop_box"], self.specs[STUDENT_MODALITY], (g.height, g.width)
            ),
            None,
        )

    def clip_names(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Ids of a batch's clips."""
        clips = self.trainer.datamodule.dataset.index.clips  # type: ignore[attr-defined]
        return [clips[i].id for i in batch["index"].tolist()]

    @property
    def _where(self) -> str:
        return f"step {self.global_step} (epoch {self.current_epoch})"

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before clipping: the gradient's norm, and no step without a usable gradient.

        Raises:
            NonFiniteError: the policy or the budget does not allow to skip this step.
        """
        reason = None if self._usable else "loss is not finite"
        self._skipped = reason is not None
        strategy = self.trainer.strategy
        deepspeed = isinstance(strategy, DeepSpeedStrategy)
        if reason is None and not (deepspeed and strategy.stage):  # whose gradients are in buckets
            self.grad_norm = grad_norm(list(self.parameters()))
            if not math.isfinite(self.grad_norm):
                self._skipped = True
                scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # which leaves such a step out
                if scaler is not None:
                    self.overflow_steps += 1
                if scaler is None or scaler.get_scale() <= MIN_LOSS_SCALE:
                    reason = "gradient is not finite"
        if reason:
            if deepspeed:
                self._step.enter_context(frozen(optimizer))
            else:  # AdamW, which has called us, passes parameters without a gradient over
                for parameter in self.parameters():
                    parameter.grad = None
            self.nonfinite.skip(self._where, reason=reason)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As Lightning's. ZeRO says the gradient's norm, and a step that it left out for that is counted too.

        Raises:
            NonFiniteError: see `on_before_optimizer_step`.
        """
        engine = getattr(self.trainer.strategy, "deepspeed_engine", None)
        before = engine.skipped_steps if engine else 0
        with self._step:
            super().optimizer_step(*args, **kwargs)
        if engine and engine.zero_optimization_stage() and self._usable:
            self.grad_norm = float(engine.get_global_grad_norm())
        if engine and engine.skipped_steps > before and not self._skipped:
            self._skipped = True
            self.nonfinite.skip(self._where, reason="gradient is not finite")

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on student and transfer head, cosine schedule by step."""
        trained = nn.ModuleDict({"student_rgb": self.student_rgb, "cmt": self.cmt})
        optimizer = make_optimizer(
            trained, lr=self.rates.lr, weight_decay=self.weight_decay, betas=self.betas, layer_decay=self.layer_decay
        )
        # a fused one would unscale fp16 gradients in its step, after they are looked at and clipped
        optimizer._step_supports_amp_scaling = False
        self._settings = param_group_hparams(optimizer)
        schedule = make_schedule(optimizer, self.rates, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def go_on(self, epoch: int, batch: int) -> None:
        """Train from this place on as this run's config says: rates, weight decay and betas are not the file's."""
        accumulate = self.trainer.accumulate_grad_batches
        steps = math.ceil(self.trainer.num_training_batches / accumulate)  # of an epoch
        self._ahead = epoch * steps + batch // accumulate - self.global_step
        for entry in self.trainer.lr_scheduler_configs:
            for group, own in zip(entry.scheduler.optimizer.param_groups, self._settings, strict=True):
                group.update(own)
            entry.scheduler.step_update(self.global_step + self._ahead)

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        """After each optimiser step. timm's schedules are told the number of steps done."""
        scheduler.step_update(self.global_step + self._ahead)
        # here, and not in a hook that a stop by a signal would leave out
        if self.ema is not None and not self._skipped:
            self._average()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights describe themselves: `meta` with epoch, step and loss; without the teachers if so wished.

        ``batch`` is the number of batches done of the epoch, None at its end; an unfinished epoch has no ``loss``.
        """
        _, batch = position(self.trainer)
        loss = None if batch else self.trainer.callback_metrics.get("train_loss")
        checkpoint["mmdistill"] = {
            **self.meta,
            "epoch": self.current_epoch,
            "step": self.global_step,
            "batch": batch or None,
            "skipped_steps": self.nonfinite.skipped,
            "overflow_steps": self.overflow_steps,
            "loss": float(loss) if loss is not None else None,
        }
        # the loop's own place would be refused by a loader that has none; ours travels with the data module
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        if not self.save_teachers:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher_")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A slim file gets this module's teachers, if they are the ones that it names.

        Raises:
            CheckpointError: they are others.
        """
        state, stored = checkpoint.get("state_dict"), checkpoint.get("mmdistill") or {}
        self.nonfinite.skipped = int(stored.get("skipped_steps", 0))
        self.overflow_steps = int(stored.get("overflow_steps", 0))
        checkpoint["lr_schedulers"] = []  # a schedule follows from config and step, see `go_on`
        if state is None:  # a directory of stock Lightning's DeepSpeed strategy: its engine has the weights
            return
        held = any(k.startswith("student_ema_rgb.") for k in state)
        if held != (self.ema is not None):
            raise CheckpointError(
                f"the checkpoint has {'an' if held else 'no'} average of the student (student_ema_rgb), this run has "
                f"trainer.ema={'null' if self.ema is None else self.ema}; set it as it was, or use resume=null"
            )
        parts = [f"teacher_{m}" for m in self.modalities]
        absent = [p for p in parts if not any(k.startswith(p + ".") for k in state)]
        check_teachers(stored.get("teachers") or {}, self.meta.get("teachers") or {}, absent)
        own = self.state_dict()
        checkpoint["state_dict"] = {
            **state, **{k: v for k, v in own.items() if k.partition(".")[0] in absent}
        }  # fmt: skip


def position(trainer: pl.Trainer) -> tuple[int, int]:
    """Where a training stands between two batches: (epoch, batches done of it); after an epoch (next epoch, 0)."""
    loop = trainer.fit_loop
    started, done = loop.epoch_progress.current.started, loop.epoch_loop.batch_progress.current.ready
    return (started - 1, done) if 0 < done < trainer.num_training_batches else (started, 0)
