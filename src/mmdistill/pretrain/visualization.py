"""Render input, masked input and prediction of a masked autoencoder: one image, a column per frame.

A prediction replaces the removed patches only. With the target ``norm_pix`` the model predicts patches without their
mean and standard deviation. Two rows show the prediction with two choices for these: those of the true patch, which the
model does not know and which make any prediction look good, and those of the visible patches, which the model could
know. The row titles name the choice.

Shapes: B batch, C channels, T frames, H x W pixels, N tokens, P = C * pt * ph * pw values of one token.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from mmdistill.builders import check_joints, check_token_grid, token_grid
from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder_for_clips
from mmdistill.checkpoint.keys import ENCODER_EMA, top_level
from mmdistill.checkpoint.load import CLASSIFIER_PREFIXES
from mmdistill.config import PretrainConfig, modality_specs
from mmdistill.files import atomic_open
from mmdistill.modalities import ModalitySpec, preprocess_clips
from mmdistill.modalities.images import (
    display_scale,
    draw_image_grid,
    hide_removed_tokens,
    render_clip,
    set_figure_title,
)
from mmdistill.models.targets import constant_baseline_loss, patch_targets, reconstruction_loss
from mmdistill.models.videomae import VideoMAE, gather_patches
from mmdistill.training.run_logger import baseline_ratio

_MAX_COLUMNS = 6  # frames shown
_DPI = 100
_STD_FLOOR = 1e-6  # as in `patch_targets`
# Titles of the rows; docs/runs.md has the same ones.
INPUT, MASKED_INPUT = "input", "masked input"
PREDICTION = "prediction\n(visible patches: input)"
PREDICTION_TRUE_STATISTICS = "prediction with the true mean\nand std of each patch\n(visible patches: input)"
PREDICTION_VISIBLE_STATISTICS = "prediction with the mean and std\nof the visible patches\n(visible patches: input)"
ENERGY_TARGET = "target: motion energy"
ENERGY_PREDICTION = "prediction: motion energy\n(visible patches: target)"


def load_masked_autoencoder(checkpoint: Checkpoint, config: PretrainConfig) -> VideoMAE:
    """The model of a pretraining checkpoint. One of another program stores no input size; that of `config` is used.

    The classifier of a joint pretraining and the average of the encoder are ignored and counted.

    Raises:
        CheckpointError: there is no decoder, or the number of heads is unknown.
        ConfigError: the encoder does not fit the clips of `config`.
        WeightMismatchError: see `load_weights`.
    """
    data, spec = config.data_module, modality_specs(config.data_module)[config.modality]
    encoder = load_encoder_for_clips(checkpoint, num_frames=data.num_frames, token_grid=token_grid(data))
    check_joints(checkpoint.meta, spec, checkpoint.path)
    check_token_grid(encoder, spec, data, checkpoint.path)
    decoder = checkpoint.find_decoder_config()
    if decoder is None:
        raise CheckpointError(f"{checkpoint.path}: has no decoder; give a checkpoint of `mmdistill pretrain`")
    model = VideoMAE(encoder.config, decoder)
    others = (*CLASSIFIER_PREFIXES, f"{ENCODER_EMA}.")
    state = {name: x for name, x in checkpoint.state_dict.items() if not name.startswith(others)}
    ignored = Counter(map(top_level, checkpoint.state_dict.keys() - state.keys()))
    notes = [f"ignored: {', '.join(f'{name} ({n})' for name, n in sorted(ignored.items()))}"] if ignored else []
    checkpoint.load_into(model, state_dict=state, notes=notes)
    return model


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

    rows = {INPUT: x[0], MASKED_INPUT: hide_removed_tokens(x[0], visible[0], grid)}
    if kind == "motion_energy":
        all_tokens = torch.arange(math.prod(grid), device=x.device)[None]
        energy = scatter_patches(patch_targets(x, all_tokens, grid, target=kind), all_tokens, grid, torch.empty_like(x))
        return {**rows, ENERGY_TARGET: energy[0], ENERGY_PREDICTION: replace_removed(prediction, energy)}
    if kind == "pixel":
        return {**rows, PREDICTION: replace_removed(prediction, x)}
    values = prediction.unflatten(2, (x.shape[1], -1))  # (1, N, C, pt*ph*pw)
    visible_statistics = (s.mean(dim=1, keepdim=True) for s in patch_statistics(visible))
    for title, (std, mean) in (
        (PREDICTION_TRUE_STATISTICS, patch_statistics(removed)),
        (PREDICTION_VISIBLE_STATISTICS, visible_statistics),
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
    """The image, uint8 (height, width, 3): rows are input, masked input and predictions, columns are frames.

    A frame has at least its own size, and at least 150 px in width.
    """
    rows = render_rows(reconstruction)
    num_frames, height, width = rows[INPUT].shape[:3]
    frames = np.unique(np.linspace(0, num_frames - 1, min(_MAX_COLUMNS, num_frames)).round().astype(int))
    column = max(150, 1.08 * width) / _DPI  # inches, with the space between two frames
    scale = min(2.0, column * _DPI / 150)  # of the text
    row = column * height / width + 0.1
    size = 1.9 * scale + column * len(frames), 0.7 * scale + row * len(rows)
    figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    shown = {name: [images[frame] for frame in frames] for name, images in rows.items()}
    draw_image_grid(figure, shown, [f"frame {frame}" for frame in frames], fontsize=8 * scale)
    ratio = baseline_ratio(reconstruction.loss, reconstruction.constant_baseline)
    loss = f"loss {reconstruction.loss:.4f} (ratio to constant baseline {ratio:.2f})"
    set_figure_title(figure, f"{title}; target {reconstruction.spec.target}, {loss}", fontsize=9 * scale)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def render_rows(reconstruction: Reconstruction) -> dict[str, np.ndarray]:
    """Display images of all rows: title -> float32 (T, H, W, 3) in [0, 1]. All rows have the same brightness scale."""
    spec, rows = reconstruction.spec, reconstruction.rows
    scales = {False: display_scale(rows[INPUT], spec)}
    if ENERGY_TARGET in rows:
        scales[True] = display_scale(rows[ENERGY_TARGET], spec, is_energy=True)
    images = {}
    for title, clip in rows.items():
        is_energy = title in (ENERGY_TARGET, ENERGY_PREDICTION)
        images[title] = render_clip(clip, spec, is_energy=is_energy, scale=scales[is_energy])
    return images


def write_png(image: np.ndarray, path: Path) -> None:
    """Write `image` atomically; creates the folder."""
    with atomic_open(path) as file:
        imsave(file, image, format="png")
