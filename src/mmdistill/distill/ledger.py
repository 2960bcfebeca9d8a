"""What each teacher contributes: variance of its features, R² of the student's predictions, share of the gradient.

`Ledger` computes it at the end of the last epoch, and every `trainer.check_val_every_n_epoch` epochs. Variance and
gradient are those of the epoch's last batch, over all ranks. For R² it reads at most 128 held-out clips, with masks,
and runs each encoder forward once per clip. Their features also give the loss and the collapse indicators of
`mmdistill.training.monitoring`. It changes nothing in the training.

Shapes: N clips, D width of a feature.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill.builders import configured_pooling, make_clip_dataset, open_readers
from mmdistill.config import ConfigError, DataModuleConfig, DistillConfig, standardization, teacher_weights
from mmdistill.data.annotations.base import AnnotationError
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.readers.base import FrameError
from mmdistill.distill.feature_file import FeatureFile
from mmdistill.distill.module import MMDistill
from mmdistill.distill.standardization import RELATIVE_STD_OF_CONSTANT
from mmdistill.distributed.collectives import all_gather_objects
from mmdistill.errors import format_count
from mmdistill.modalities import STUDENT_MODALITY
from mmdistill.models.pooling import Pooling
from mmdistill.training.monitoring import (
    describe_held_out,
    encode_clips,
    eval_mode,
    held_out_data,
    held_out_metrics,
    is_due,
    select_positions,
)
from mmdistill.training.run import Training


@dataclass(frozen=True)
class ClipFeatures:
    """Features of N clips: of the student (N, D), and of each teacher (N, D of the teacher), float32 on the CPU."""

    student: Tensor
    teachers: Mapping[str, Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Clips that the student is not trained on.

    Attributes:
        dataset: the clips; None: there are none.
        positions: those that are read.
        source: their annotation file.
        problems: why a teacher's features are not computed, by teacher; under "" for all teachers.
    """

    dataset: ClipDataset | None
    positions: Sequence[int]
    source: str
    problems: Mapping[str, str] = field(default_factory=dict)


def mean_variance(features: Tensor) -> float | None:
    """Variance of features (N, D) over clips, the mean over dimensions; None for one clip, or not finite values."""
    value = float(features.double().var(dim=0, unbiased=False).mean())
    return value if len(features) > 1 and math.isfinite(value) else None


def is_constant(features: Tensor) -> bool:
    """Whether features (N, D) of at least two clips are the same for all, up to rounding of float32 values."""
    x = features.double()
    return len(x) > 1 and bool((x.std(dim=0, unbiased=False) <= RELATIVE_STD_OF_CONSTANT * x.mean(dim=0).abs()).all())


def r_squared(
    targets: Tensor, predictions: Tensor, labels: Sequence[str]
) -> tuple[float | None, dict[str, float | None]]:
    """R² of predictions (N, D), overall and by label; None if the targets do not vary, or a value is not finite.

    ``1 - sum of squared errors / sum of squared deviations of the targets from their mean``, both over clips and
    dimensions. The mean is that of all clips, also for a label. A clip with the label "" has no class.
    """
    y, prediction = targets.double(), predictions.double()
    errors = (y - prediction).square().sum(dim=1)
    deviations = (y - y.mean(dim=0)).square().sum(dim=1)

    def ratio(rows: Sequence[int]) -> float | None:
        total = float(deviations[rows].sum())
        value = 1 - float(errors[rows].sum()) / total if total else math.nan
        return value if math.isfinite(value) else None

    rows_by_label: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows_by_label.setdefault(label, []).append(row)
    by_class = {label: ratio(rows) for label, rows in sorted(rows_by_label.items()) if label}
    return ratio(range(len(y))), by_class


def gradient_shares(module: MMDistill, features: ClipFeatures) -> dict[str, float]:
    """Norm of the gradient of each teacher's weighted loss for the student's features, divided by the sum of all norms.

    0 for all teachers if no loss has a gradient.
    """
    device, weights = module.device, module.target_options.weights
    norms = {}
    for name, raw in features.teachers.items():
        feature = features.student.to(device).detach().requires_grad_(True)
        target = module.target(name, raw.to(device))
        loss = weights.get(name, 1.0) * F.mse_loss(module.cmt(feature)[name].float(), target)
        (gradient,) = torch.autograd.grad(loss, feature)
        norms[name] = float(gradient.double().norm())
    total = sum(norms.values())
    return {name: norm / total if total and math.isfinite(total) else 0.0 for name, norm in norms.items()}


def target_settings(config: DistillConfig) -> list[str]:
    """``KEY=VALUE`` of the settings that change what the student learns and differ from their default."""
    key, pooling = "trainer.standardize_targets", configured_pooling(config)
    weights = [f"{name}:{weight:g}" for name, weight in teacher_weights(config.trainer).items() if weight != 1]
    method = standardization(key, config.trainer.standardize_targets)
    return [
        *([f"trainer.teacher_weights={{{','.join(weights)}}}"] if weights else []),
        *([f"{key}={method}"] if method else []),
        *([f"pooling={pooling.name}"] if pooling.name != Pooling.name else []),
        *([f"pooling_last_k={pooling.last_k}"] if pooling.name == "last_k" else []),
    ]


class Ledger(pl.Callback):
    """Compute the ledger, log it, and keep it for the checkpoint of the same epoch. It comes before `TrainingCallback`.

    Attributes:
        current: the ledger of this epoch as plain containers, see `compute`; None in other epochs.
    """

    def __init__(self, training: Training, files: Mapping[str, FeatureFile]) -> None:
        self.training, self.files = training, dict(files)
        self.current: dict[str, Any] | None = None
        self._held_out: HeldOut | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the ledger of the last epoch."""
        self.current = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Compute and log the ledger in the epochs that have one. Collective."""
        every, epoch = self.training.config.trainer.check_val_every_n_epoch, trainer.current_epoch
        if (epoch + 1 != trainer.max_epochs and not is_due(every, epoch)) or pl_module.last_features is None:
            return
        # eager: other batch sizes would compile the encoders again
        with self.training.throughput.pause(), eval_mode(pl_module), torch.compiler.set_stance("force_eager"):
            self.current = self.compute(pl_module, epoch)
        self.training.extra_metrics |= ledger_metrics(self.current)
        self.training.log.info("\n".join(ledger_lines(self.current)))

    def compute(self, module: MMDistill, epoch: int) -> dict[str, Any]:
        """The ledger, the same on all ranks. Collective.

        Returns:
            ``epoch``; ``settings``, see `target_settings`; ``train_clips`` and ``held_out_clips``, numbers of clips;
            ``held_out``, annotation file of these; ``problems``, see `HeldOut`; ``teachers``: by teacher ``variance``,
            ``is_constant``, ``gradient_share``, ``r2`` and ``r2_by_class`` (by name of the class); ``monitoring``:
            result of `held_out_metrics` for the student, without a loss if that of a teacher is unknown; empty without
            held-out clips.
        """
        train = _last_batch(module)
        held_out = self._held_out = self._held_out or find_held_out(self.training, module, self.files)
        about = {
            "epoch": epoch,
            "settings": target_settings(cast(DistillConfig, self.training.config)),
            "train_clips": len(train.student),
            "held_out_clips": len(held_out.positions),
            "held_out": held_out.source,
        }
        with _step_precision(module):
            shares = gradient_shares(module, train)
        teachers: dict[str, dict[str, Any]] = {
            name: {
                "variance": mean_variance(x),
                "is_constant": is_constant(x),
                "gradient_share": shares[name],
                "r2": None,
                "r2_by_class": {},
            }
            for name, x in train.teachers.items()
        }
        problems, monitoring = dict(held_out.problems), {}
        if held_out.dataset is not None:
            names = [name for name in module.names if name not in problems]
            found = self._encode(module, held_out.dataset, held_out.positions, names)
            if isinstance(found, str):
                problems[""] = found
            else:
                index = held_out.dataset.index
                numbers = [index.clips[i].label for i in held_out.positions]
                labels = [index.classes[number] if number >= 0 else "" for number in numbers]
                with _step_precision(module):
                    found_r2 = _all_r_squared(module, found, labels)
                    losses = None if problems else held_out_losses(module, found)
                monitoring = held_out_metrics(found.student, losses)
                for name, (overall, by_class) in found_r2.items():
                    teachers[name] |= {"r2": overall, "r2_by_class": by_class}
        return {**about, "problems": problems, "teachers": teachers, "monitoring": monitoring}

    def _encode(
        self, module: MMDistill, dataset: ClipDataset, positions: Sequence[int], names: Iterable[str]
    ) -> ClipFeatures | str:
        """The features of the clips at `positions`, or why they cannot be read. Collective."""
        names = list(names)

        def encode(batch: Mapping[str, Tensor]) -> list[Tensor]:
            batch = {key: value.to(module.device) for key, value in batch.items()}
            with _step_precision(module):
                rgb, weights = module.input(STUDENT_MODALITY, batch), module.pooling_weights(batch)
                student = module.student.embed(rgb, batch["visible"], module.pooling, weights)
                found = module.targets(batch, [name for name in names if name not in self.files])
            clips = [dataset.index.clips[i].id for i in batch["index"].tolist()]
            found |= {name: self.files[name].select(clips) for name in names if name in self.files}
            return [student, *(found[name] for name in names)]

        found = encode_clips(dataset, positions, encode, batch_size=self.training.config.batch_size)
        if isinstance(found, str):  # a file cannot be read; the training itself does not need it
            return found
        student, *teachers = found
        return ClipFeatures(student, dict(zip(names, teachers, strict=True)))


def _step_precision(module: MMDistill) -> AbstractContextManager[object]:
    """The autocast of a training step. Batches are collated outside of it: it does not support all dtypes."""
    return module.trainer.precision_plugin.train_step_context()


def _last_batch(module: MMDistill) -> ClipFeatures:
    """The features of the last batch of all ranks."""
    student, teachers = cast(tuple[Tensor, Mapping[str, Tensor]], module.last_features)
    own = {"": student.float().cpu(), **{name: x.detach().float().cpu() for name, x in teachers.items()}}
    parts = all_gather_objects(own)
    merged = {name: torch.cat([part[name] for part in parts]) for name in own}
    return ClipFeatures(merged.pop(""), merged)


def held_out_losses(module: MMDistill, features: ClipFeatures) -> tuple[float, float]:
    """The weighted sum of the teachers' losses on these clips, and that of the best constant features."""
    weights = module.target_options.weights
    loss = baseline = 0.0
    with torch.no_grad():
        predictions = module.cmt(features.student.to(module.device))
        for name, raw in features.teachers.items():
            target, weight = module.target(name, raw.to(module.device)), weights.get(name, 1.0)
            loss += weight * float(F.mse_loss(predictions[name].float(), target))
            baseline += weight * float(target.var(dim=0, unbiased=False).mean())
    return loss, baseline


def _all_r_squared(
    module: MMDistill, features: ClipFeatures, labels: Sequence[str]
) -> dict[str, tuple[float | None, dict[str, float | None]]]:
    """`r_squared` of each teacher, in the units of the loss."""
    with torch.no_grad():
        predictions = module.cmt(features.student.to(module.device))
        return {
            name: r_squared(module.target(name, raw.to(module.device)).cpu(), predictions[name].float().cpu(), labels)
            for name, raw in features.teachers.items()
        }


def find_held_out(training: Training, module: MMDistill, files: Mapping[str, FeatureFile]) -> HeldOut:
    """The clips of `val_json_path`, else of `fewshot_eval_json_path`, and the teachers that lack files for them."""
    config = training.config
    data = held_out_data(config.data_module)
    source = data.fewshot_eval_json_path
    problems: dict[str, str] = {}
    for modality in module.modalities:
        try:
            open_readers(data, (modality,))
        except ConfigError as error:
            problems[modality] = str(error)
    try:
        dataset = _make_dataset(data, [m for m in module.modalities if m not in problems], config.seed, module.pooling)
        positions = select_positions(len(dataset))
        if lacking := _lacking_files(dataset, positions):
            problems |= lacking
            dataset = _make_dataset(
                data, [m for m in module.modalities if m not in problems], config.seed, module.pooling
            )
            positions = select_positions(len(dataset))
    except (ConfigError, AnnotationError, FrameError) as error:
        return HeldOut(None, (), source, {"": str(error)})
    ids = [dataset.index.clips[i].id for i in positions]
    for name, file in files.items():
        if missing := file.missing(ids):
            problems[name] = (
                f"{len(missing)} of {format_count(len(ids), 'held-out clip')} have no feature in {file.path}"
            )
    return HeldOut(dataset, positions, source, problems)


def _make_dataset(data: DataModuleConfig, modalities: Sequence[str], seed: int, pooling: Pooling) -> ClipDataset:
    """Held-out clips with one fixed mask each, of these modalities and those that the student's feature needs."""
    needed = ("skeleton",) if pooling.name == "person" else ()
    names = tuple(dict.fromkeys((STUDENT_MODALITY, *modalities, *needed)))
    return make_clip_dataset(data, names, training=False, masked=True, seed=seed, needs_motion=pooling.name == "motion")


def _lacking_files(dataset: ClipDataset, positions: Sequence[int]) -> dict[str, str]:
    """The number of clips without all their files, as a sentence by modality, but not of the student's modality."""
    problems = {}
    clips = [dataset.index.clips[i] for i in positions]
    for name, reader in dataset.readers.items():
        count = sum(bool(reader.missing_frames(clip.video, list(clip.frames))) for clip in clips)
        if count and name != STUDENT_MODALITY:
            problems[name] = f"{count} of {format_count(len(clips), 'held-out clip')} lack {name} files"
    return problems


def ledger_metrics(ledger: Mapping[str, Any]) -> dict[str, float]:
    """``variance_TEACHER``, ``gradient_share_TEACHER``, ``r2_TEACHER`` and those of the student, for the trackers."""
    own: dict[str, float] = ledger.get("monitoring", {})
    return own | {
        f"{key}_{name}": values[key]
        for name, values in ledger["teachers"].items()
        for key in ("variance", "gradient_share", "r2")
        if values[key] is not None
    }


def ledger_lines(ledger: Mapping[str, Any]) -> list[str]:
    """The ledger for the log: a line per teacher, then a line per problem."""
    lines = [
        f"teachers after epoch {ledger['epoch']}: variance and share of the gradient norm on "
        f"{format_count(ledger['train_clips'], 'training clip')} (the last batch), R2 of the student on "
        f"{format_count(ledger['held_out_clips'], 'held-out clip')} of {ledger['held_out']}"
    ]
    for name, values in ledger["teachers"].items():
        by_class = [value for value in values["r2_by_class"].values() if value is not None]
        classes = f" (classes {min(by_class):.2f} to {max(by_class):.2f})" if len(by_class) > 1 else ""
        lines.append(
            f"  {name}: variance {_format(values['variance'], '.3g')}, gradient "
            f"{100 * values['gradient_share']:.1f} %, R2 {_format(values['r2'], '.3f')}{classes}"
        )
    if ledger.get("monitoring"):
        lines.append(f"  student: {describe_held_out(ledger['monitoring'])}")
    lines += [
        f"teacher {name}: its features are constant, so nothing can be learned from them, although its loss may have a "
        "gradient; remove it from trainer.teachers, or change its entry in trainer.ckpt_path"
        for name, values in ledger["teachers"].items()
        if values["is_constant"]
    ]
    for name, problem in ledger["problems"].items():
        lines.append(f"R2 of {name or 'all teachers'} is unknown: {problem}")
    return lines


def _format(value: float | None, digits: str) -> str:
    return "unknown" if value is None else f"{value:{digits}}"
