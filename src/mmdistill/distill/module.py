"""The LightningModule: three frozen teachers, one RGB student, one transfer head.

MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.3): student and teachers see the same visible tokens of
the same clip; the loss is the sum over teachers of the mean squared error between the transfer head's output and the
teacher's feature.
"""

import copy
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from mmdistill.modality import ModalitySpec
from mmdistill.models.cmt import CrossModalTransfer
from mmdistill.models.inputs import prepare
from mmdistill.models.videomae import Encoder
from mmdistill.optim import LearningRates, make_optimizer, make_schedule


class MMDistill(pl.LightningModule):
    """Student, teachers and transfer head; keys ``student_rgb.encoder.*``, ``teacher_flow.encoder.*``, ``cmt.*`` ....

    Args:
        teachers: frozen encoders by modality; must hold ``rgb``, which the student starts as a copy of.
        specs: how each modality's raw clips become input.
        rates: learning rates of the schedule.
        weight_decay, betas: of AdamW.
        warmup_steps, total_steps: optimiser steps of the linear warm-up and of the whole schedule.
        meta: plain containers that travel with the weights (geometries, statistics, teachers' names and digests).
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
    ) -> None:
        super().__init__()
        self.specs, self.rates, self.meta = dict(specs), rates, dict(meta)
        self.weight_decay, self.betas = weight_decay, betas
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self.modalities = tuple(teachers)
        self.student_rgb = nn.ModuleDict({"encoder": copy.deepcopy(teachers["rgb"])})
        self.student_rgb.requires_grad_(True)
        for modality, encoder in teachers.items():
            frozen = nn.ModuleDict({"encoder": encoder}).requires_grad_(False).eval()
            self.add_module(f"teacher_{modality}", frozen)
        widths = {m: e.geometry.dim for m, e in teachers.items()}
        self.cmt = CrossModalTransfer(teachers["rgb"].geometry.dim, widths)

    def train(self, mode: bool = True) -> "MMDistill":
        """Teachers stay in eval mode whatever is asked."""
        super().train(mode)
        for modality in self.modalities:
            self.teacher(modality).eval()
        return self

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
        visible = batch["visible"]
        inputs = {}
        for modality in self.modalities:
            g = self.teacher(modality).geometry
            inputs[modality] = prepare(batch[modality], batch["view"], self.specs[modality], (g.height, g.width))
        with torch.no_grad():
            targets = {m: self.teacher(m).embed(inputs[m], visible).float() for m in self.modalities}
        predictions = self.cmt(self.student.embed(inputs["rgb"], visible))
        return {
            m: (F.mse_loss(predictions[m].float(), targets[m]), targets[m].var(dim=0, unbiased=False).mean())
            for m in self.modalities
        }

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """The sum of the teachers' losses."""
        losses = self.losses(batch)
        total = torch.stack([loss for loss, _ in losses.values()]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"distillation loss is {float(total)} at step {self.global_step}; clip numbers "
                f"{batch['index'].tolist()}. Lower trainer.lr or set trainer.clip_grad"
            )
        values = {"train_loss": total}
        for modality, (loss, trivial) in losses.items():
            values[f"train_loss_{modality}"] = loss
            values[f"trivial_loss_{modality}"] = trivial
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=len(batch["index"]), sync_dist=True)
        return total

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW on student and transfer head, cosine schedule by step."""
        trained = nn.ModuleDict({"student_rgb": self.student_rgb, "cmt": self.cmt})
        optimizer = make_optimizer(trained, lr=self.rates.lr, weight_decay=self.weight_decay, betas=self.betas)
        schedule = make_schedule(optimizer, self.rates, warmup_steps=self.warmup_steps, total_steps=self.total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any) -> None:
        """timm's schedules are told the number of steps done."""
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights describe themselves: `meta` with epoch, step and loss."""
        loss = self.trainer.callback_metrics.get("train_loss")
        checkpoint["mmdistill"] = {
            **self.meta,
            "epoch": self.current_epoch,
            "step": self.global_step,
            "loss": float(loss) if loss is not None else None,
        }
