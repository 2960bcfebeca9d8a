"""The table of modalities: the one place that knows what an ``rgb``, a ``flow`` or a ``skeleton`` clip looks like.

A modality is data, not a file: every loop, dataset and model is written once and told which `ModalitySpec` to use.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class ModalitySpec:
    """What one modality looks like to a model.

    Attributes:
        name: ``rgb``, ``flow`` or ``skeleton``.
        channels: channels of the model input: 3 colours in [0, 1], 2 displacements in px, 17 joint heat-maps in [0, 1].
        scale: stored-frame pixels per input pixel and axis. 1 for images; 4 for heat-maps, which MM-CDFSL renders at
            56 x 96 for a 224 x 384 frame, with a patch 4 times smaller, so that all modalities share one token grid.
        mean, std: per channel, in the units above; the input is ``(value - mean) / std``. A single number serves all
            channels.
        target: what masked autoencoding predicts: ``patch`` (per-patch normalised values, VideoMAE section 3.1),
            ``centred``, ``energy`` or ``pixel``; see `mmdistill.models.targets.patch_targets`.
        sigma: standard deviation of a joint's Gaussian in heat-map pixels (skeleton only).
    """

    name: str
    channels: int
    scale: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target: str
    sigma: float = 0.6

    def __post_init__(self) -> None:
        for field in ("mean", "std"):
            values = getattr(self, field)
            if len(values) == 1:
                object.__setattr__(self, field, tuple(values) * self.channels)
            elif len(values) != self.channels:
                raise ValueError(
                    f"{self.name}: {field} has {len(values)} values, {self.channels} channels need as many (or 1)"
                )
        if min(self.std) <= 0:
            raise ValueError(f"{self.name}: std must be positive, got {self.std}")
        if self.target not in ("patch", "centred", "energy", "pixel"):
            raise ValueError(f"{self.name}: target is patch, centred, energy or pixel, got {self.target!r}")

    def with_statistics(
        self, mean: tuple[float, ...], std: tuple[float, ...], sigma: float | None = None
    ) -> "ModalitySpec":
        """The same modality with the statistics (and, unless None, the `sigma`) of another dataset."""
        return replace(self, mean=tuple(mean), std=tuple(std), sigma=self.sigma if sigma is None else sigma)

    @property
    def statistics(self) -> dict[str, Any]:
        """What a checkpoint keeps, for its weights have learned from such inputs; see `stored_statistics`."""
        drawn = {"sigma": self.sigma} if self.name == "skeleton" else {}
        return {"mean": list(self.mean), "std": list(self.std), **drawn}


def stored_statistics(meta: Mapping[str, Any], modality: str) -> tuple[Any, ...] | None:
    """Of a checkpoint's metadata, the arguments of `with_statistics`; None where it has none for the modality."""
    found = (meta.get("statistics") or {}).get(modality)
    return (tuple(found["mean"]), tuple(found["std"]), found.get("sigma")) if found else None


MODALITIES: tuple[str, ...] = ("rgb", "flow", "skeleton")

# rgb: the ImageNet statistics that VideoMAE uses. flow and skeleton: identity until a dataset config gives its own.
MODALITY_SPECS: dict[str, ModalitySpec] = {
    "rgb": ModalitySpec("rgb", 3, 1, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "patch"),
    "flow": ModalitySpec("flow", 2, 1, (0.0,), (1.0,), "patch"),
    "skeleton": ModalitySpec("skeleton", 17, 4, (0.0,), (1.0,), "pixel"),
}
