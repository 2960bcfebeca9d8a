"""A modality: its spec, reader, preprocessing and display image.

Everything that differs between ``rgb``, ``flow`` and ``skeleton`` is in their `Modality` subclasses. Datasets, models
and both trainings work with any registered modality. docs/extending.md describes how to add one.

Shapes: B batch, C channels, T frames, H x W stored frame, h x w model input.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.errors import format_count
from mmdistill.modalities.keypoints import KeypointLayout
from mmdistill.models import TARGETS
from mmdistill.plugins import Registry

if TYPE_CHECKING:  # torch takes seconds to import, and the command line needs names and channels only
    import numpy as np
    from torch import Tensor

    from mmdistill.data.readers.base import Reader


Statistics = tuple[float, ...]  # one value per channel, or one for all


@dataclass(frozen=True)
class StoredHeatmaps:
    """Heat-maps in files. A heat-map of `size` covers the stored frame of `frame_size`; both are (height, width)."""

    size: tuple[int, int]
    frame_size: tuple[int, int]

    def scale_boxes(self, crop_boxes: "Tensor") -> "Tensor":
        """Crop boxes, (B, 5), from stored-frame px to heat-map px, float32."""
        boxes = crop_boxes.float()
        return boxes * boxes.new_tensor((*self.size, *self.size, 1)) / boxes.new_tensor((*self.frame_size * 2, 1))


@dataclass(frozen=True)
class ModalitySpec:
    """The values that determine how clips of one modality become model input: ``(value - mean) / std``."""

    name: str
    channels: int  # of the model input
    # Stored-frame pixels per input pixel and axis; 1 for images. MM-CDFSL renders heat-maps at 56 x 96 for a 224 x 384
    # frame (stride 4) with a patch of 4, so that all modalities share one token grid.
    input_stride: int
    mean: Statistics  # per channel, in the units of the modality; a single value is used for all channels
    std: Statistics
    target: str  # what masked autoencoding predicts; see `mmdistill.models.targets.patch_targets`
    # std of a keypoint's Gaussian in heat-map pixels; None for stored heat-maps and modalities without keypoints
    sigma: float | None = None
    compensate: str | None = None  # how the camera motion is removed from flow: "median"; None: it is kept
    keypoints: KeypointLayout | None = None  # the channels of a modality with keypoints
    heatmaps: StoredHeatmaps | None = None  # if the heat-maps are stored

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) == 1:
                object.__setattr__(self, name, tuple(values) * self.channels)
            elif len(values) != self.channels:
                raise ValueError(
                    f"{self.name}: {name} has {format_count(len(values), 'value')}, expected {self.channels} or 1"
                )
        if min(self.std) <= 0:
            raise ValueError(f"{self.name}: std must be positive, got {self.std}")
        if self.target not in TARGETS:
            raise ValueError(f"{self.name}: target={self.target!r} is not one of {', '.join(TARGETS)}")

    def with_statistics(
        self, mean: Statistics, std: Statistics, sigma: float | None = None, compensate: str | None = None
    ) -> "ModalitySpec":
        """The same spec with the statistics of another dataset. ``sigma=None`` keeps the current value."""
        sigma = self.sigma if sigma is None else sigma
        return replace(self, mean=tuple(mean), std=tuple(std), sigma=sigma, compensate=compensate)

    @property
    def statistics(self) -> dict[str, Any]:
        """The values that a checkpoint stores because its weights depend on them; see `stored_statistics`."""
        joints = None if self.keypoints is None else list(self.keypoints.channel_names)
        options = {"sigma": self.sigma, "compensate": self.compensate, "joints": joints}
        return {"mean": list(self.mean), "std": list(self.std), **{k: v for k, v in options.items() if v is not None}}


def stored_statistics(meta: Mapping[str, Any], modality: str) -> tuple[Any, ...] | None:
    """The arguments of `ModalitySpec.with_statistics` from a checkpoint's metadata; None if they are not stored."""
    found = (meta.get("statistics") or {}).get(modality)
    if not found:
        return None
    return tuple(found["mean"]), tuple(found["std"]), found.get("sigma"), found.get("compensate")


def stored_joints(meta: Mapping[str, Any], modality: str) -> tuple[str, ...] | None:
    """The names of the heat-map channels from a checkpoint's metadata; None if they are not stored."""
    found = ((meta.get("statistics") or {}).get(modality) or {}).get("joints")
    return tuple(found) if found else None


@dataclass(frozen=True)
class ExtraKeypointFiles:
    """Files with further keypoints of a keypoint modality, one per video."""

    root: Path
    pattern: str  # file name below `root`
    file_format: SkeletonFormat


@dataclass(frozen=True)
class ReaderOptions:
    """Options of a reader."""

    frame_size: tuple[int, int]  # (height, width) of the stored frames in px
    pattern: str | None = None  # file name below the directory; None: the modality's default
    frame_number_offset: int = 0  # number of frame 0 in file names
    max_persons: int = 2  # persons per frame of a keypoint reader
    flow_bound: float | None = None  # displacement in px of gray 255 in flow images; None: the flow is not in images
    flow_axes: str = "xy"  # names of the axes in the file names of flow images
    skeleton: SkeletonFormat = field(default_factory=SkeletonFormat)
    heatmap_size: tuple[int, int] | None = None  # (height, width) of stored heat-maps; None: keypoint files
    extra_keypoints: ExtraKeypointFiles | None = None

    @property
    def frame_files(self) -> dict[str, Any]:
        """The arguments of a `FrameFileReader`, besides its folder."""
        keys = ("frame_size", "pattern", "frame_number_offset")
        return {key: getattr(self, key) for key in keys}


class Modality(ABC):
    """One kind of input. Subclass it and call `register_modality` to add another one."""

    name: str  # in config keys, checkpoints and reports
    channels: int  # of the model input
    mean: Statistics = (0.0,)  # this and the next five are defaults of `ModalitySpec`
    std: Statistics = (1.0,)
    target: str = "norm_pix"
    input_stride: int = 1
    sigma: float | None = None
    keypoints: KeypointLayout | None = None
    compensations: tuple[str, ...] = ()  # allowed values of `ModalitySpec.compensate`
    is_frame_pair: bool = False  # frame k is computed from images k and k + 1, so a video of n images has n - 1
    pattern_fields: tuple[str, ...] = ()  # fields that file name patterns must contain, such as ``video``, ``frame``
    optional_pattern_fields: tuple[str, ...] = ()  # fields that they may contain

    def spec(self, **changes: Any) -> ModalitySpec:
        """The modality's default spec with `changes`. Raises `ValueError` if a value is not allowed."""
        names = ("name", "channels", "input_stride", "mean", "std", "target", "sigma", "keypoints")
        defaults = {name: getattr(self, name) for name in names}
        spec = ModalitySpec(**{**defaults, **changes})
        if spec.compensate not in (None, *self.compensations):
            allowed = ", ".join(("null", *self.compensations))
            raise ValueError(f"{self.name}: compensate={spec.compensate!r} is not one of {allowed}")
        return spec

    @abstractmethod
    def open_reader(self, root: Path, options: ReaderOptions) -> "Reader":
        """A reader of the modality's files below `root`."""

    @abstractmethod
    def preprocess(self, clips: "Tensor", crop_boxes: "Tensor", spec: ModalitySpec, size: tuple[int, int]) -> "Tensor":
        """Crop, resize, flip and normalize a batch of raw clips; see `preprocess_clips`."""

    def display_max(self, values: "Tensor") -> float:
        """The value of a (C, T, h, w) clip that is displayed at full brightness."""
        return float(values.max())

    def to_image(self, values: "Tensor") -> "np.ndarray":
        """Grayscale images of the largest channel. Override it for a better display.

        Args:
            values: (C, T, h, w) float32 in the modality's units, divided by `display_max`.

        Returns:
            (T, h, w, 3); values outside [0, 1] are clipped by the caller.
        """
        image: np.ndarray = values.amax(dim=0)[..., None].expand(-1, -1, -1, 3).numpy()
        return image

    def energy_to_image(self, values: "Tensor") -> "np.ndarray":
        """Like `to_image` for motion energies, which are not negative: the largest channel."""
        return Modality.to_image(self, values)


MODALITIES: Registry[Modality] = Registry("modality", "mmdistill.modalities")


def register_modality(modality: Modality) -> Modality:
    """Register a modality under its name, for configs, datasets, trainings and evaluations."""
    return MODALITIES.register(modality.name, modality)


def get_modality(name: str) -> Modality:
    """The registered modality called `name`."""
    return MODALITIES.get(name)


def modality_names() -> tuple[str, ...]:
    """Names of all registered modalities: rgb, flow, skeleton, then all others."""
    return MODALITIES.names()


def preprocess_clips(clips: "Tensor", crop_boxes: "Tensor", spec: ModalitySpec, size: tuple[int, int]) -> "Tensor":
    """Crop, resize, flip and normalize a batch of raw clips on the device that holds them.

    `clips` are arrays of the modality's reader. `crop_boxes` are float (B, 5), on the CPU: top, left, height, width of
    the crop in stored-frame px, and 1 for a horizontal flip. The result is float32 (B, C, T, h, w) with `size` (h, w).
    """
    return get_modality(spec.name).preprocess(clips, crop_boxes.cpu(), spec, size)
