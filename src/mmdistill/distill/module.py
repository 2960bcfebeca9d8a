"""The LightningModule: frozen teachers, one RGB student, one transfer head.

MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.3): student and teachers get the same visible tokens of
the same clip. The loss is the sum over teachers of the mean squared error between the transfer head's output and the
teacher's feature, which is standardized if `trainer.standardize_targets` is set, times the teacher's weight.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.profiler import record_function

from mmdistill.checkpoint import CheckpointError
from mmdistill.config import standardization
from mmdistill.distill.parallel_encoders import MAX_TOKENS_FOR_THREADING, run_in_parallel
from mmdistill.distill.standardization import TargetStandardizer, make_standardizers
from mmdistill.distill.teacher_cache import TeacherCache
from mmdistill.distill.teachers import check_teacher_digests
from mmdistill.distributed.collectives import all_reduce_mean
from mmdistill.modalities import STUDENT_MODALITY, ModalitySpec, preprocess_clips
from mmdistill.models.flops import encoder_flops, encoder_training_flops, linear_flops
from mmdistill.models.pooling import Pooling, person_weights
from mmdistill.models.transfer_head import CrossModalTransfer
from mmdistill.models.videomae import Encoder
from mmdistill.training.nonfinite import NonFiniteGuard, zero_loss
from mmdistill.training.optim import Optimization, StepSchedule, make_optimizer

_CPU_KEYS = ("crop_box", "index", "label")  # of a batch: read by `preprocess_clips`, and for names of clips


@dataclass(frozen=True)
class TargetOptions:
    """What the student learns from the teachers' features.

    Attributes:
        standardize: ``standard``, ``phi_s`` or None, see `TargetStandardizer`.
        weights: factor of each teacher's loss, by teacher; 1 for the others.
        cache: features that replace the teachers.
        files: features of the training clips, float32 (clips, D), of each teacher that is a file, by its name.
    """

    standardize: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    cache: TeacherCache | None = None
    files: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StudentOptions:
    """The student's start, its average and its feature.

    Attributes:
        encoder: with the initial weights; None: a copy of the RGB teacher.
        ema: decay per optimizer step of an average of the student, component ``student_ema_rgb``; None: no average.
        pooling: of the features of student and teachers.
    """

    encoder: Encoder | None = None
    ema: float | None = None
    pooling: Pooling = field(default_factory=Pooling)


class MMDistill(pl.LightningModule):
    """Student, teachers and transfer head; keys ``student_rgb.encoder.*``, ``teacher_flow.encoder.*``, ``cmt.*`` ....

    Args:
        teachers: frozen encoders by modality. ``rgb`` is required if the student is initialized as its copy.
        specs: preprocessing of each modality's raw clips.
        optimization: hyperparameters of AdamW and its schedule.
        guard: policy for a loss that is not finite; None: such a loss is used.
        targets: standardization, weights, cache and files of features.
        sources: path and sha256 of each teacher by component, see `load_teachers`.
        save_teachers: False: checkpoints do not contain the teachers.
        student: its start, its average and the pooling.
    """

    def __init__(
        self,
        teachers: Mapping[str, Encoder],
        specs: Mapping[str, ModalitySpec],
        optimization: Optimization,
        *,
        guard: NonFiniteGuard | None = None,
        targets: TargetOptions | None = None,
        sources: Mapping[str, Any] | None = None,
        save_teachers: bool = True,
        student: StudentOptions | None = None,
    ) -> None:
        super().__init__()
        self.modalities, self.specs, self.optimization = tuple(teachers), dict(specs), optimization
        self.names = (*self.modalities, *(targets.files if targets else ()))
        self.target_options, student = targets or TargetOptions(), student or StudentOptions()
        self.pooling = student.pooling
        self.guard, self.cache, self.ema = guard, self.target_options.cache, student.ema
        self.sources, self.save_teachers = dict(sources or {}), save_teachers
        self._is_compiled = False
        self.last_features: tuple[Tensor, Mapping[str, Tensor]] | None = None  # of student and teachers, last batch
        self.student_rgb = nn.ModuleDict({"encoder": student.encoder or copy.deepcopy(teachers[STUDENT_MODALITY])})
        self.student_rgb.requires_grad_(True)
        for modality, encoder in teachers.items():
            teacher = nn.ModuleDict({"encoder": encoder}).requires_grad_(False).eval()
            self.add_module(f"teacher_{modality}", teacher)
        if self.ema is not None:
            self.student_ema_rgb = copy.deepcopy(self.student_rgb).requires_grad_(False).eval()
            # not torch's AveragedModel, which reads its number of updates from the device in each of them
            self._update_average = get_ema_multi_avg_fn(self.ema)
        widths = {m: self.pooling.num_parts * encoder.config.dim for m, encoder in teachers.items()}
        widths |= {name: rows.shape[1] for name, rows in self.target_options.files.items()}
        self.cmt = CrossModalTransfer(self.pooling.num_parts * self.student.config.dim, widths)
        self.target_statistics = make_standardizers(widths, self.target_options.standardize)

    def train(self, mode: bool = True) -> "MMDistill":
        """Set the mode of the student and the transfer head; teachers and average stay in eval mode."""
        super().train(mode)
        for name, child in self.named_children():
            if name not in ("student_rgb", "cmt"):
                child.eval()
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

    @record_function("transfer")
    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Keep what the CPU reads on the CPU: a read from a GPU would wait for it. Traces show the transfer."""
        moved = {key: value for key, value in batch.items() if key not in _CPU_KEYS}
        return {**batch, **super().transfer_batch_to_device(moved, device, dataloader_idx)}

    @record_function("forward")
    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> dict[str, Any]:
        """Forward pass of one batch.

        Returns:
            ``loss``, the weighted sum of the teachers' losses; ``values``, the means over all ranks of this sum, each
            loss without its weight and its constant baseline, which are empty if the loss is not finite.
        """
        losses, weights = self.losses(batch), self.target_options.weights
        total = torch.stack([loss * weights.get(m, 1.0) for m, (loss, _) in losses.items()]).sum()
        values = {"train_loss": total}
        for modality, (loss, constant_baseline) in losses.items():
            values[f"train_loss_{modality}"] = loss
            values[f"constant_baseline_loss_{modality}"] = constant_baseline
        means = dict(zip(values, all_reduce_mean(list(values.values())), strict=True))
        if self.guard is not None:
            is_first = batch_index % self.trainer.accumulate_grad_batches == 0
            if not self.guard.before_backward(total, means["train_loss"], batch["index"], is_first=is_first):
                # DDP and DeepSpeed need a backward pass on every rank and for every batch
                return {"loss": zero_loss(list(self.parameters())), "values": {}}
        return {"loss": total, "values": means}

    def flops_per_clip(self, num_visible: int) -> int:
        """FLOPs of a training step of the current epoch per clip. Features of the cache and of files cost nothing."""
        student = self.student
        flops = encoder_training_flops(student.config, num_visible, recomputes=student.checkpoint_activations)
        if self.cache is None or not self.cache.is_cached(self.current_epoch):
            flops += sum(encoder_flops(self.teacher(m).config, num_visible) for m in self.modalities)
        heads = [layer for layer in self.cmt.modules() if isinstance(layer, nn.Linear)]
        return flops + 3 * sum(linear_flops(1, head.in_features, head.out_features) for head in heads)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        """The student's features of clips without a mask, (B, D); `Validation` scores them."""
        x, pooling = self.input(STUDENT_MODALITY, batch), self.pooling.for_evaluation
        return self.student.embed(x, None, pooling, batch.get("motion"))

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """By teacher: (mean squared error, that of the best constant feature on this batch); float32 scalars."""
        visible, rgb = batch["visible"], self.input(STUDENT_MODALITY, batch)
        weights = self.pooling_weights(batch)

        def encode_student() -> Tensor:
            return self.student.embed(rgb, visible, self.pooling, weights)

        if self.cache is not None and self.cache.is_cached(self.current_epoch):
            targets, feature = self.cache.features(self.current_epoch, batch["index"]), encode_student()
            targets = {name: target.to(feature.device, non_blocking=True) for name, target in targets.items()}
        else:
            *teacher_features, feature = self._run_jobs(
                [*self._teacher_jobs(batch, rgb, self.modalities), encode_student], visible
            )
            targets = dict(zip(self.modalities, teacher_features, strict=True))
            if self.cache is not None:
                self.cache.add(self.current_epoch, batch["index"], targets)
        for name, rows in self.target_options.files.items():
            targets[name] = rows[batch["index"]].to(feature.device, non_blocking=True)
        self.last_features = feature.detach(), targets
        predictions = self.cmt(feature)
        return {
            m: (F.mse_loss(predictions[m].float(), target), target.var(dim=0, unbiased=False).mean())
            for m, target in self._standardize(targets).items()
        }

    def input(self, modality: str, batch: Mapping[str, Tensor]) -> Tensor:
        """The preprocessed clips of a modality, (B, C, T, h, w)."""
        g = (self.student if modality == STUDENT_MODALITY else self.teacher(modality)).config
        return preprocess_clips(batch[modality], batch["crop_box"], self.specs[modality], (g.height, g.width))

    def targets(self, batch: Mapping[str, Tensor], modalities: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The teachers' features by modality, (B, D) float32 each; `modalities`: of these teachers only.

        A placeholder job replaces the student's: with the same number of jobs each job gets the same number of threads,
        so the features are bit-identical to those of a training step.
        """
        visible = batch["visible"]
        modalities = self.modalities if modalities is None else modalities
        jobs = [*self._teacher_jobs(batch, self.input(STUDENT_MODALITY, batch), modalities), lambda: visible]
        *teacher_features, _ = self._run_jobs(jobs, visible)
        return dict(zip(modalities, teacher_features, strict=True))

    def _standardize(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The targets of a batch; in the first epoch of a training its features are added to the statistics before."""
        if self.target_statistics and self.training and self.current_epoch == 0:
            for name, feature in features.items():
                self.standardizer(name).update(feature)
        return {name: self.target(name, feature) for name, feature in features.items()}

    def target(self, teacher: str, features: Tensor) -> Tensor:
        """What the student learns to predict: a teacher's features (B, D), standardized if this is configured."""
        return self.standardizer(teacher)(features) if self.target_statistics else features

    def standardizer(self, teacher: str) -> TargetStandardizer:
        """The statistics of a teacher's features. They exist with `trainer.standardize_targets` only."""
        return cast(TargetStandardizer, self.target_statistics[teacher])

    def on_train_epoch_end(self) -> None:
        """After the first epoch, complete the statistics. Lightning saves checkpoints after this call. Collective."""
        if self.current_epoch == 0:
            for name in self.target_statistics:
                self.standardizer(name).finish()

    def _teacher_jobs(
        self, batch: Mapping[str, Tensor], rgb: Tensor, modalities: Sequence[str]
    ) -> list[Callable[[], Tensor]]:
        """One job per teacher, in the order of `modalities`, that computes its feature. `rgb` is preprocessed."""
        weights = self.pooling_weights(batch)

        @torch.no_grad()
        def encode_teacher(modality: str) -> Tensor:
            x = rgb if modality == STUDENT_MODALITY else self.input(modality, batch)
            return self.teacher(modality).embed(x, batch["visible"], self.pooling, weights).float()

        return [partial(encode_teacher, modality) for modality in modalities]

    def pooling_weights(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """The weights (B, L) of the tokens, which student and teachers share; None if the pooling needs none."""
        if self.pooling.name == "person":
            layout = self.specs["skeleton"].keypoints
            num_joints = len(layout.names) - layout.num_extra if layout else None
            joints = batch["skeleton"][..., :num_joints, :]
            return person_weights(joints, batch["crop_box"], self.student.config.grid)
        return batch["motion"] if self.pooling.name == "motion" else None

    def _run_jobs(self, jobs: Sequence[Callable[[], Tensor]], visible: Tensor) -> list[Tensor]:
        """The results of independent `jobs` that encode the tokens `visible`; in parallel if that is faster."""
        # torch.compile does not support several threads; a recomputed block needs the same number of threads again
        must_be_sequential = self._is_compiled or self.student.checkpoint_activations
        if self.device.type != "cpu" or visible.numel() > MAX_TOKENS_FOR_THREADING or must_be_sequential:
            return [job() for job in jobs]
        return run_in_parallel(jobs)

    def update_average(self) -> None:
        """Update the student's average, if there is one, after an optimizer step."""
        if self.ema is not None:
            self._update_average([*self.student_ema_rgb.parameters()], [*self.student_rgb.parameters()], 1)

    def configure_optimizers(self) -> Any:
        """AdamW on student and transfer head, with a cosine schedule by step."""
        trainable = nn.ModuleDict({"student_rgb": self.student_rgb, "cmt": self.cmt})
        optimizer = make_optimizer(trainable, self.optimization)
        # otherwise a fused AdamW unscales fp16 gradients inside its step, after they are checked and clipped
        optimizer._step_supports_amp_scaling = False
        schedule = StepSchedule(optimizer, self.optimization)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Do nothing: `TrainingCallback` sets the position of the schedule."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the teachers if `save_teachers` is False."""
        if not self.save_teachers:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {k: v for k, v in state.items() if not k.startswith("teacher_")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add this module's teachers to a student-only checkpoint, if their digests match.

        Raises:
            CheckpointError: the digests differ; only one of checkpoint and run has an average of the student; or the
                targets differ.
        """
        state, stored = checkpoint.get("state_dict"), checkpoint.get("mmdistill") or {}
        checkpoint["lr_schedulers"] = []  # the schedule follows from config and position, see `StepSchedule.restore`
        _check_same_targets((stored.get("config") or {}).get("trainer") or {}, self.target_options)
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
        check_teacher_digests(stored.get("teachers") or {}, self.sources, missing)
        own_teachers = {k: v for k, v in self.state_dict().items() if k.partition(".")[0] in missing}
        checkpoint["state_dict"] = {**state, **own_teachers}


def _check_same_targets(stored: Mapping[str, Any], own: TargetOptions) -> None:
    """Raise `CheckpointError` unless a run with the trainer config `stored` had the same targets and weights."""
    method = standardization("trainer.standardize_targets", stored.get("standardize_targets", False))
    given = stored.get("teacher_weights") or {}
    weights = {m: float(given.get(m, 1.0)) for m in {*given, *own.weights}}
    own_weights = {m: float(own.weights.get(m, 1.0)) for m in weights}
    for key, found, expected in (
        ("standardize_targets", method or "false", own.standardize or "false"),
        ("teacher_weights", weights, own_weights),
    ):
        if found != expected:
            raise CheckpointError(
                f"the checkpoint was trained with trainer.{key}={found}, this run has {expected}; use the same "
                "setting, or resume=null"
            )
