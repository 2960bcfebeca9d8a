"""The student as one callable: frames in, feature out. The exports contain the same module."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.keys import ENCODER_EMA
from mmdistill.checkpoint.load import select_encoder
from mmdistill.checkpoint.read import Checkpoint, open_checkpoint
from mmdistill.data.motion import frame_difference, token_weights
from mmdistill.modalities import get_modality, stored_statistics
from mmdistill.models.pooling import Pooling
from mmdistill.models.preprocessing import crop_resize_flip, normalize
from mmdistill.models.videomae import Encoder

log = logging.getLogger(__name__)


class FeatureExtractor(nn.Module):
    """Normalization and encoder of one modality.

    Attributes:
        modality: name of the modality.
        mean, std: statistics of the encoder's training data, one value per channel, in the units of the modality.
        pooling: that of the encoder's training.
    """

    def __init__(
        self,
        encoder: Encoder,
        modality: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling or Pooling()
        self.modality, self.mean, self.std = modality, mean, std

    def forward(self, clips: Tensor, weights: Tensor | None = None) -> Tensor:
        """Features of clips of the encoder's size.

        Args:
            clips: rgb: uint8 (B, T, H, W, 3). Other modalities: float32 (B, C, T, H, W) in their units (flow: px;
                skeleton: heat-maps in [0, 1]).
            weights: with motion pooling those of the tokens, float32 (B, L).

        Returns:
            float32 (B, D), see `Encoder.embed`.
        """
        x = clips.permute(0, 4, 1, 2, 3).float() / 255 if self.modality == "rgb" else clips.clone()
        return self.encoder.embed(normalize(x, self.mean, self.std), None, self.pooling, weights)


class Student:
    """A `FeatureExtractor` for rgb frames of any size.

    Attributes:
        extractor: its parameters do not require gradients.
        frame_size: (height, width) in px of the frames of the training.
        resize: ``crop``: the input is the center crop of such a frame; ``squash``: it is the frame, resized per axis.
        num_frames: number of frames T of a clip.
        width: number of values D of a feature.
    """

    def __init__(self, extractor: FeatureExtractor, frame_size: tuple[int, int], resize: str = "crop") -> None:
        self.extractor, self.frame_size, self.resize = extractor, frame_size, resize
        self.num_frames = extractor.encoder.config.num_frames
        self.width = extractor.pooling.num_parts * extractor.encoder.config.dim

    def __repr__(self) -> str:
        return f"Student(num_frames={self.num_frames}, frame_size={self.frame_size}, width={self.width})"

    def __call__(self, frames: np.ndarray | Tensor) -> Tensor:
        """Features of one clip or of a batch.

        Frames of the size of the input are not changed. With ``resize="crop"`` others are scaled until they cover
        `frame_size`, with antialiasing. Then the center is cropped, as in the evaluation. With ``"squash"`` they are
        scaled to `frame_size`, with antialiasing, and then resized to the input, as in the evaluation.

        Args:
            frames: uint8 (T, H, W, 3) or (B, T, H, W, 3), RGB. T is the number of frames of the encoder.

        Returns:
            float32 (D,) or (B, D), on the device of the encoder.

        Raises:
            ValueError: another dtype, shape or number of frames.
        """
        clips = torch.as_tensor(frames)
        num_frames = self.num_frames
        if clips.dtype != torch.uint8 or clips.ndim not in (4, 5) or clips.shape[-1] != 3:
            raise ValueError(
                f"expected uint8 frames (T, H, W, 3) or (B, T, H, W, 3), got {clips.dtype} {tuple(clips.shape)}"
            )
        if clips.shape[-4] != num_frames:
            raise ValueError(f"expected {num_frames} frames, got {clips.shape[-4]}; select {num_frames} of them")
        batch = clips if clips.ndim == 5 else clips[None]
        device = self.extractor.encoder.patch_embed.proj.weight.device
        with torch.inference_mode():
            fitted = self._fit(batch.to(device))
            weights = self._motion(fitted) if self.extractor.pooling.name == "motion" else None
            features: Tensor = self.extractor(self._squash(fitted), weights)
        return features if clips.ndim == 5 else features[0]

    def _fit(self, clips: Tensor) -> Tensor:
        """The part of the frames that becomes the input: scaled to `frame_size`, and cropped unless it is squashed."""
        h, w = self.extractor.encoder.config.height, self.extractor.encoder.config.width
        height, width = clips.shape[2:4]
        if (height, width) == (h, w):
            return clips
        scale = max(self.frame_size[0] / height, self.frame_size[1] / width)
        is_crop = self.resize == "crop"
        size = (round(height * scale), round(width * scale)) if is_crop else self.frame_size
        if size != (height, width):
            images = clips.flatten(0, 1).permute(0, 3, 1, 2).float()  # (B * T, 3, H, W)
            images = F.interpolate(images, size, mode="bilinear", antialias=True).round().to(torch.uint8)
            clips = images.permute(0, 2, 3, 1).unflatten(0, clips.shape[:2])
        if not is_crop:
            return clips
        top, left = (clips.shape[2] - h) // 2, (clips.shape[3] - w) // 2
        return clips[:, :, top : top + h, left : left + w]

    def _squash(self, clips: Tensor) -> Tensor:
        """uint8 (B, T, H, W, 3) -> uint8 or float32 (B, T, h, w, 3), 0 to 255; nothing changes if the size is right."""
        box = torch.tensor([[0, 0, *clips.shape[2:4], 0]]).expand(len(clips), 5)
        config = self.extractor.encoder.config
        squashed = crop_resize_flip(clips.permute(0, 4, 1, 2, 3), box, (config.height, config.width))
        return squashed.permute(0, 2, 3, 4, 1)

    def _motion(self, clips: Tensor) -> Tensor:
        """The weights of the tokens, as in the evaluation. uint8 (B, T, H, W, 3) -> float32 (B, L)."""
        box, grid = np.array([0, 0, *clips.shape[2:4], 0], np.float32), self.extractor.encoder.config.grid
        weights = [token_weights(frame_difference(clip), box, grid) for clip in clips.cpu().numpy()]
        return torch.from_numpy(np.stack(weights)).to(clips.device)


def find_modality(checkpoint: Checkpoint, component: str) -> str | None:
    """The modality of an encoder, by its name or the metadata; without metadata rgb if it has 3 channels, else None."""
    if "_" in component and component != ENCODER_EMA:
        return component.rpartition("_")[2]
    if stored := checkpoint.meta.get("modality"):
        return str(stored)
    weight = checkpoint.state_dict.get("encoder.patch_embed.proj.weight")
    return "rgb" if weight is not None and weight.shape[1] == get_modality("rgb").channels else None


def find_statistics(checkpoint: Checkpoint, modality: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of a modality in a checkpoint. For rgb without metadata those of ImageNet, which is logged.

    Raises:
        CheckpointError: the checkpoint has none for another modality, the modality is unknown, or its input needs more
            than mean and std.
    """
    stored = stored_statistics(checkpoint.meta, modality) if modality else None
    if modality and stored:
        mean, std, _, compensate = stored
        if compensate:
            raise CheckpointError(
                f"{checkpoint.path} was trained with data_module.modalities.{modality}.compensate={compensate}, which "
                "an exported encoder does not apply; use `mmdistill features` or `mmdistill evaluate`"
            )
        channels = {"channels": len(mean)} if len(mean) > 1 else {}  # of keypoints those of the training
        spec = get_modality(modality).spec(mean=mean, std=std, **channels)
    elif modality == "rgb":
        spec = get_modality(modality).spec()
        log.warning(
            "%s has no mean and std; those of ImageNet are used: %s, %s",
            checkpoint.path,
            list(spec.mean),
            list(spec.std),
        )
    else:
        raise CheckpointError(
            f"{checkpoint.path}: has no mean and std of its {modality or 'unknown'} input; use --to safetensors, or "
            "load_encoder (Python) and normalize the clips yourself"
        )
    return spec.mean, spec.std


def find_frame_size(checkpoint: Checkpoint, encoder: Encoder) -> tuple[int, int]:
    """(height, width) in px of the frames of the training, of which the input is a crop; if unknown, of the input."""
    stored = checkpoint.meta.get("frame_size")  # of an export
    stored = stored or ((checkpoint.meta.get("config") or {}).get("data_module") or {}).get("frame_size")
    height, width = stored or (encoder.config.height, encoder.config.width)
    return int(height), int(width)


def stored_resize(meta: Mapping[str, Any]) -> str:
    """How frames became model input in the training of a checkpoint with metadata `meta`: ``crop`` or ``squash``."""
    stored = (meta.get("config") or {}).get("data_module") or {}
    return str(meta.get("resize") or stored.get("resize", "crop"))  # an export has it at the top


def stored_pooling(meta: Mapping[str, Any]) -> Pooling | None:
    """The pooling of a checkpoint with metadata `meta`, for the evaluation; None if it stores none."""
    stored = meta if "pooling" in meta else meta.get("config") or {}  # an export has it at the top
    name, last_k = stored.get("pooling"), stored.get("pooling_last_k", Pooling.last_k)
    return None if name is None else Pooling(name, last_k).for_evaluation


def load_student(
    path: str | os.PathLike[str], *, component: str | None = None, device: torch.device | str = "cpu"
) -> Student:
    """Load the student of a distilled checkpoint, or the encoder of any other rgb checkpoint, for frames.

    ``load_student("last.ckpt")(frames)`` returns the feature of a clip; see `Student`.

    Args:
        path: see `open_checkpoint`.
        component: name of the encoder; None is the student.
        device: device of the encoder.

    Raises:
        CheckpointError: the path cannot be read, or the encoder has another modality than rgb.
    """
    checkpoint = open_checkpoint(path)
    component = select_encoder(checkpoint.state_dict, component, checkpoint.path).component
    modality = find_modality(checkpoint, component)
    if modality != "rgb":
        raise CheckpointError(
            f"{path}: {component} has the modality {modality}, but frames need rgb; give an rgb checkpoint, or use "
            "load_encoder (Python)"
        )
    mean, std = find_statistics(checkpoint, modality)
    encoder = checkpoint.encoder(component).to(device).eval().requires_grad_(False)
    extractor = FeatureExtractor(encoder, modality, mean, std, stored_pooling(checkpoint.meta))
    return Student(extractor, find_frame_size(checkpoint, encoder), stored_resize(checkpoint.meta))
