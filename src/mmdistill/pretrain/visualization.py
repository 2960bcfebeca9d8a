"""Render input, masked input and reconstruction of a masked autoencoder: one image, a column per frame.

With the target ``norm_pix`` the model predicts patches without their mean and standard deviation. Two rows show the
reconstruction with two choices for these: those of the true patch, which the model does not know and which make any
prediction look good, and those of the visible patches, which the model could know. The row titles name the choice.

Shapes: B batch, C channels, T frames, H x W pixels, N tokens, P = C * pt * ph * pw values of one token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from mmdistill.modalities import ModalitySpec, get_modality, preprocess_clips
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import VideoMAE, gather_patches
from mmdistill.training.run_logger import baseline_ratio

_GRAY = 0.5  # of removed patches
_MAX_COLUMNS = 6  # frames shown
_STD_FLOOR = 1e-6  # as in `patch_targets`
_ENERGY_TARGET, _ENERGY_PREDICTION = "target: motion energy", "prediction: motion energy"  # row titles


@dataclass(frozen=True)
class Reconstruction:
    """A clip of a modality and its reconstruction.

    Attributes:
        rows: title -> (C, T, H, W) float32, in the normalized units of the input or, for the target ``motion_energy``,
            in those of the target; hidden values are NaN.
        loss, constant_baseline: losses of the model and of the best constant per channel on this clip.
    """

    spec: ModalitySpec
    rows: dict[str, Tensor]
    loss: float
    constant_baseline: float


@torch.no_grad()
def reconstruct(model: VideoMAE, batch: Mapping[str, Tensor], spec: ModalitySpec) -> Reconstruction:
    """Run the model on the first clip of a batch, in eval mode; all removed tokens are predicted.

    The model's training mode is restored. Under ZeRO 3 all ranks must call this together.
    """
    g, parameter = model.encoder.config, next(model.parameters())
    clip, visible = batch[spec.name][:1].to(parameter.device), batch["visible"][:1].to(parameter.device)
    x = preprocess_clips(clip, batch["crop_box"][:1], spec, (g.height, g.width))
    training = model.training
    model.eval()
    prediction, removed = model(x.to(parameter.dtype), visible)
    model.train(training)
    target = patch_targets(x, removed, g.grid, target=spec.target)
    loss, baseline = reconstruction_loss(prediction, target), constant_baseline_loss(target, g.channels)
    rows = _rows(x, visible, removed, prediction.float(), spec.target, g.grid)
    return Reconstruction(spec, {k: v.cpu() for k, v in rows.items()}, float(loss), float(baseline))


def _rows(
    x: Tensor, visible: Tensor, removed: Tensor, prediction: Tensor, kind: str, grid: tuple[int, int, int]
) -> dict[str, Tensor]:
    """The image rows. (1, C, T, H, W), (1, Nv), (1, N), (1, N, P) -> title -> (C, T, H, W)."""

    def replace_removed(values: Tensor, base: Tensor) -> Tensor:
        return scatter_patches(values, removed, grid, base)[0]

    def patch_statistics(index: Tensor) -> tuple[Tensor, Tensor]:
        """Unbiased std and mean of each token and channel, (1, N, C, 1) each."""
        return torch.std_mean(gather_patches(x, index, grid).flatten(3), dim=3, keepdim=True)

    rows = {"input": x[0], "masked": replace_removed(torch.full_like(prediction, float("nan")), x)}
    if kind == "motion_energy":
        all_tokens = torch.arange(math.prod(grid), device=x.device)[None]
        energy = scatter_patches(patch_targets(x, all_tokens, grid, target=kind), all_tokens, grid, torch.empty_like(x))
        return {**rows, _ENERGY_TARGET: energy[0], _ENERGY_PREDICTION: replace_removed(prediction, energy)}
    if kind == "pixel":
        return {**rows, "reconstruction": replace_removed(prediction, x)}
    values = prediction.unflatten(2, (x.shape[1], -1))  # (1, N, C, pt*ph*pw)
    visible_statistics = (s.mean(dim=1, keepdim=True) for s in patch_statistics(visible))
    for title, (std, mean) in (
        ("reconstruction + true\nmean and std of each patch", patch_statistics(removed)),
        ("reconstruction + mean and std\nof the visible patches", visible_statistics),
    ):
        rows[title] = replace_removed((values * (std + _STD_FLOOR) + mean).flatten(2), x)
    return rows


def scatter_patches(values: Tensor, index: Tensor, grid: tuple[int, int, int], base: Tensor) -> Tensor:
    """`base` with its tokens `index` replaced by `values`, in `patch_targets`' order. (B, N, P) -> (B, C, T, H, W)."""
    b, c, frames, height, width = base.shape
    t, h, w = grid
    out = base.clone()
    cells = out.view(b, c, t, frames // t, h, height // h, w, width // w).permute(0, 2, 4, 6, 1, 3, 5, 7)
    patch = values.unflatten(2, (c, frames // t, height // h, width // w))
    batch = torch.arange(b, device=base.device)[:, None]
    cells[batch, index // (h * w), index // w % h, index % w] = patch.to(out.dtype)
    return out


def draw(reconstruction: Reconstruction, title: str) -> np.ndarray:
    """The image, uint8 (height, width, 3): one row each for input, mask and reconstructions, one column per frame."""
    x, rows = reconstruction.rows["input"], render_rows(reconstruction)
    frames = np.unique(np.linspace(0, x.shape[1] - 1, min(_MAX_COLUMNS, x.shape[1])).round().astype(int))
    width, height = 1.9 + 1.5 * len(frames), 0.7 + 1.5 * x.shape[2] / x.shape[3] * len(rows)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(frames), squeeze=False)
    for (name, images), row_axes in zip(rows.items(), axes, strict=True):
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for ax, frame in zip(row_axes, frames, strict=True):
            ax.imshow(images[frame], interpolation="nearest")
            ax.set(xticks=[], yticks=[])
    for ax, frame in zip(axes[0], frames, strict=True):
        ax.set_title(f"frame {frame}", fontsize=8)
    ratio = baseline_ratio(reconstruction.loss, reconstruction.constant_baseline)
    loss = f"loss {reconstruction.loss:.4f} (ratio to constant baseline {ratio:.2f})"
    figure.suptitle(f"{title}; target {reconstruction.spec.target}, {loss}", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_png(image: np.ndarray, path: Path) -> None:
    """Write `image`; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, image)


def render_rows(reconstruction: Reconstruction) -> dict[str, np.ndarray]:
    """Display images of all rows: title -> float32 (T, H, W, 3) in [0, 1]. All rows have the same brightness scale."""
    spec, rows = reconstruction.spec, reconstruction.rows
    max_input = get_modality(spec.name).display_max(_in_own_units(rows["input"], spec))
    max_energy = float(_in_own_units(rows[_ENERGY_TARGET], spec, is_energy=True).max()) if _ENERGY_TARGET in rows else 0
    images = {}
    for title, clip in rows.items():
        is_energy = title in (_ENERGY_TARGET, _ENERGY_PREDICTION)
        scale = max(max_energy if is_energy else max_input, 1e-6)
        images[title] = to_display_image(clip, spec, is_energy=is_energy, scale=scale)
    return images


def _in_own_units(x: Tensor, spec: ModalitySpec, *, is_energy: bool = False) -> Tensor:
    """Undo the normalization of a clip or of motion energies, which have no mean."""
    std, mean = (torch.tensor(values).view(-1, 1, 1, 1) for values in (spec.std, spec.mean))
    return x * std if is_energy else x * std + mean


def to_display_image(clip: Tensor, spec: ModalitySpec, *, is_energy: bool, scale: float) -> np.ndarray:
    """Display images of a clip. (C, T, H, W) -> float32 (T, H, W, 3) in [0, 1]; NaN becomes gray.

    The modality's `to_image` or, for motion energies, `energy_to_image` renders `clip` in its own units over `scale`.
    """
    hidden = clip.isnan().any(dim=0)[..., None].numpy()
    modality = get_modality(spec.name)
    values = torch.nan_to_num(_in_own_units(clip, spec, is_energy=is_energy)) / scale
    image = modality.energy_to_image(values) if is_energy else modality.to_image(values)
    return np.where(hidden, _GRAY, np.clip(image, 0, 1)).astype(np.float32)
