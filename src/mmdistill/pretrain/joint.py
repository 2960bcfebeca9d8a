"""The loss of joint pretraining on an unlabeled target and a labeled source.

MM-CDFSL (Hatano et al., ECCV 2024, arXiv 2405.19917, section 3.2):
``lambda_target * reconstruction(target) + lambda_source * reconstruction(source) + lambda_ce * cross-entropy(source)``.
A target clip and its source clip have the same mask. docs/method.md lists the config keys.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill.builders import make_encoder_config
from mmdistill.config import ConfigError, PretrainConfig, loss_weights, modality_specs, removes_no_token
from mmdistill.data.dataset import ClipDataset
from mmdistill.modalities import preprocess_clips
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import EncoderConfig
from mmdistill.training.nonfinite import zero_loss
from mmdistill.training.run_logger import baseline_ratio


def label_entropy(labels: np.ndarray) -> float:
    """Cross-entropy in nats of the best constant prediction: the entropy of the distribution of int `labels` (N,)."""
    counts = np.unique(labels, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def source_classes(source: Mapping[str, Any] | None) -> dict[str, str]:
    """Number and digest of the classes in the entry ``source`` of metadata, for `check_compatible`; None: no class."""
    classes = source["classes"] if source else []
    digest = hashlib.sha256("\n".join(classes).encode()).hexdigest()[:8]
    return {"source classes": f"{len(classes)} (sha256 {digest})"}


class JointLoss:
    """The terms of the joint loss of one training. A term with the weight 0 is not computed.

    Attributes:
        spec: how source clips become model input, with the statistics of their own dataset.
        num_classes: outputs of the classifier; 0 without the cross-entropy.
        reconstructed: which of ``target`` and ``source`` have a reconstruction term; none if the mask removes no token.
    """

    def __init__(self, config: PretrainConfig, source: ClipDataset, encoder: EncoderConfig) -> None:
        assert config.source is not None
        self.encoder, self.modality, self.weights = encoder, config.modality, loss_weights(config)
        self.spec = modality_specs(config.source)[config.modality]
        self.num_classes = len(source.index.classes) if self.weights.ce else 0
        self.reconstructed = [
            name
            for name in ("target", "source")
            if getattr(self.weights, name) and not removes_no_token(config.data_module)
        ]
        self.clips_per_target = 2 if "target" in self.reconstructed else 1  # that are encoded
        self._label_entropy = label_entropy(np.array([clip.label for clip in source.index.clips]))
        # of a checkpoint: dataset, statistics, and the classes that the encoder has learned
        self.meta: dict[str, Any] = {
            "dataset": config.source.name,
            "label_fields": config.source.label_fields,
            "classes": list(source.index.classes) if self.num_classes else [],
            "statistics": {config.modality: self.spec.statistics},
        }

    def __str__(self) -> str:
        """The formula with its weights, for the log."""
        shown = [f"{getattr(self.weights, name):g} * reconstruction of {name}" for name in self.reconstructed]
        if self.num_classes:
            shown.append(f"{self.weights.ce:g} * cross-entropy of {self.num_classes} classes of source")
        note = "" if self.reconstructed else " (nothing is reconstructed)"
        return f"loss {' + '.join(shown)}{note}"

    @property
    def weight_compat(self) -> dict[str, Any]:
        """What must match on resume besides the settings of the target, see `check_compatible`."""
        statistics = {f"source {key}": value for key, value in self.spec.statistics.items()}
        return {**source_classes(self.meta), **statistics}

    def __call__(
        self, model: Any, target: Tensor, source: Mapping[str, Tensor], visible: Tensor, predict: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; and by name its constant baseline, its terms with their constant baselines, and the accuracy.

        Args:
            model: a `JointVideoMAE`, or a `VideoMAE` without the cross-entropy; or a DeepSpeed engine of it.
            target: model input (B, C, T, h, w) of the target clips, float32.
            source: the entry ``source`` of a batch of `JointDataset`.
            visible: the common mask, int64 (B, Lv).
            predict: tokens to reconstruct, int64 (B, Lp); None: all removed tokens.

        Returns:
            float32 scalars: ``constant_baseline_loss``; ``loss_X`` and ``constant_baseline_loss_X`` with X ``target``,
            ``source``, ``ce``; ``accuracy_source``.
        """
        raw, size = (
            source[self.modality].to(target.device, non_blocking=True),
            (self.encoder.height, self.encoder.width),
        )
        clips = [preprocess_clips(raw, source["crop_box"], self.spec, size)]
        if "target" in self.reconstructed:
            clips.append(target)
        options = {"num_source": len(raw)} if self.num_classes else {}
        predictions, predicted, *logits = model(
            torch.cat(clips).to(next(model.parameters()).dtype),
            visible.repeat(len(clips), 1),
            None if predict is None else predict.repeat(len(clips), 1),
            **options,
        )
        terms: dict[str, tuple[Tensor, Tensor]] = {}  # name -> loss, constant baseline
        for name, x, prediction in zip(("source", "target"), clips, predictions.chunk(len(clips)), strict=False):
            if name in self.reconstructed:
                wanted = patch_targets(x, predicted[: len(x)], self.encoder.grid, target=self.spec.target)
                baseline = constant_baseline_loss(wanted, self.encoder.channels)
                terms[name] = (reconstruction_loss(prediction, wanted), baseline)
        accuracy: dict[str, Tensor] = {}
        for scores in logits:
            labels = source["label"].to(scores.device, non_blocking=True)
            entropy = torch.full((), self._label_entropy, device=scores.device)
            terms["ce"] = (F.cross_entropy(scores.float(), labels), entropy)
            accuracy["accuracy_source"] = (scores.argmax(dim=1) == labels).float().mean()
        weights = {name: getattr(self.weights, name) for name in terms}
        loss, baseline = (sum(weights[name] * pair[i] for name, pair in terms.items()) for i in (0, 1))
        values = {"constant_baseline_loss": baseline}
        for name, pair in terms.items():
            values |= {f"loss_{name}": pair[0], f"constant_baseline_loss_{name}": pair[1]}
        if not self.reconstructed:  # DeepSpeed needs a gradient of the decoder, too
            loss = loss + zero_loss(list(model.parameters()))
        return loss, {**values, **accuracy}


def make_joint_loss(config: PretrainConfig, source: ClipDataset | None) -> JointLoss | None:
    """The loss of a pretraining with a source; None without.

    Raises:
        ConfigError: there is no source, and the mask removes no token.
    """
    if source is None:
        if removes_no_token(config.data_module):
            raise ConfigError(
                f"data_module.mask_ratio={config.data_module.mask_ratio} removes no token, so there is nothing to "
                "reconstruct; use a larger ratio, or set source=DATASET to train its classifier"
            )
        return None
    encoder = make_encoder_config(config.model, config.data_module, modality_specs(config.data_module)[config.modality])
    return JointLoss(config, source, encoder)


def describe_terms(means: Mapping[str, float]) -> str:
    """``: target 0.0318 (ratio to constant baseline 0.644), ...`` for the log; empty without a source."""
    parts = []
    for name in ("target", "source", "ce"):
        if f"loss_{name}" in means:
            loss = means[f"loss_{name}"]
            ratio = baseline_ratio(loss, means[f"constant_baseline_loss_{name}"])
            parts.append(f"{name} {loss:.4f} (ratio to constant baseline {ratio:.3f})")
    if "accuracy_source" in means:
        parts.append(f"accuracy of the source {means['accuracy_source']:.3f}")
    return ": " + ", ".join(parts) if parts else ""
