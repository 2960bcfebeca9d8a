"""What a masked autoencoder sees and says: input, masked input, reconstruction, frame by frame, as one picture.

Under the target ``norm_pix`` a network predicts a patch's pattern, not its mean and contrast; under ``centred`` not its
mean. Two rows show both ways to fill them in: with the true patch's statistics, which the network does not know and
which make any output look good, and with those of the visible patches, which it could know. Each row says which.

Shapes: B batch, C channels, T frames, H x W pixels, N tokens, P = pt * ph * pw * C values of one token.
"""

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

_GRAY = 0.5  # of removed patches
_COLUMNS = 6  # frames shown at most
_STD_FLOOR = 1e-6  # as in `patch_targets`


@dataclass(frozen=True)
class Reconstruction:
    """One clip and what the network makes of it.

    Attributes:
        spec: the modality.
        rows: title -> (C, T, H, W) float32, in the input's normalised units or, for the target ``motion_energy``, in those of
            the target; what is not shown is NaN.
        loss, trivial: of this clip: the network's, and that of the best constant per channel.
    """

    spec: ModalitySpec
    rows: dict[str, Tensor]
    loss: float
    trivial: float


@torch.no_grad()
def reconstruct(model: VideoMAE, batch: Mapping[str, Tensor], spec: ModalitySpec) -> Reconstruction:
    """Run the network on the first clip of a batch; every removed token is predicted.

    The model's mode is restored. Under ZeRO 3 all ranks must call this together.
    """
    g = model.encoder.config
    parameter = next(model.parameters())
    clip, visible = batch[spec.name][:1].to(parameter.device), batch["visible"][:1].to(parameter.device)
    x = preprocess_clips(clip, batch["crop_box"][:1], spec, (g.height, g.width))
    training = model.training
    model.eval()
    prediction, removed = model(x.to(parameter.dtype), visible)
    model.train(training)
    target = patch_targets(x, removed, g.grid, target=spec.target)
    loss, trivial = reconstruction_loss(prediction, target), constant_baseline_loss(target, g.channels)
    rows = _rows(x, visible, removed, prediction.float(), spec.target, g.grid)
    return Reconstruction(spec, {k: v.cpu() for k, v in rows.items()}, float(loss), float(trivial))


def _rows(
    x: Tensor, visible: Tensor, removed: Tensor, prediction: Tensor, kind: str, grid: tuple[int, int, int]
) -> dict[str, Tensor]:
    """(1, C, T, H, W), (1, Nv), (1, N), (1, N, P) -> title -> (C, T, H, W)"""
    size = tuple(x.shape[1:])

    def shown(values: Tensor, base: Tensor) -> Tensor:
        return scatter_patches(values, removed, grid, base)[0]

    hidden = torch.full_like(prediction, float("nan"))
    rows = {"input": x[0], "masked": shown(hidden, x)}
    if kind == "motion_energy":
        target = patch_targets(x, _all(x, grid), grid, target=kind)
        whole = scatter_patches(target, _all(x, grid), grid, torch.empty(1, *size, device=x.device))
        return {**rows, "target: motion energy": whole[0], "prediction of it": shown(prediction, whole)}
    if kind == "pixel":
        return {**rows, "reconstruction": shown(prediction, x)}
    channels = x.shape[1]
    true_mean, true_std = _statistics(x, removed, grid)
    seen_mean, seen_std = (s.mean(dim=1, keepdim=True) for s in _statistics(x, visible, grid))
    values = prediction.unflatten(2, (channels, -1))  # (1, N, C, pt*ph*pw)
    for title, mean, std in (
        ("reconstruction + true\nmean and std of each patch", true_mean, true_std),
        ("reconstruction + mean and std\nof the visible patches", seen_mean, seen_std),
    ):
        rows[title] = shown((values * (std + _STD_FLOOR) + mean).flatten(2), x)
    return rows


def _all(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return torch.arange(grid[0] * grid[1] * grid[2], device=x.device)[None]


def _statistics(x: Tensor, index: Tensor, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std of each token and channel. (1, N, C, 1) both"""
    std, mean = torch.std_mean(gather_patches(x, index, grid).flatten(3), dim=3, keepdim=True)
    return mean, std


def scatter_patches(values: Tensor, index: Tensor, grid: tuple[int, int, int], base: Tensor) -> Tensor:
    """The inverse of `patch_targets`' order: `base` with the tokens `index` replaced. (B, N, P) -> (B, C, T, H, W)"""
    b, c, frames, height, width = base.shape
    t, h, w = grid
    out = base.clone()
    cells = out.view(b, c, t, frames // t, h, height // h, w, width // w).permute(0, 2, 4, 6, 1, 3, 5, 7)
    rows = torch.arange(b, device=base.device)[:, None]
    patch = values.unflatten(2, (c, frames // t, height // h, width // w))
    cells[rows, index // (h * w), index // w % h, index % w] = patch.to(out.dtype)
    return out


def draw(found: Reconstruction, title: str) -> np.ndarray:
    """The picture, uint8 (height, width, 3): a row each for input, mask and reconstructions, a column per frame."""
    spec = found.spec
    x = found.rows["input"]
    frames = np.unique(np.linspace(0, x.shape[1] - 1, min(_COLUMNS, x.shape[1])).round().astype(int))
    cell_w, cell_h = 1.5, 1.5 * x.shape[2] / x.shape[3]
    figure = Figure(figsize=(1.9 + cell_w * len(frames), 0.7 + cell_h * len(found.rows)), layout="constrained", dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(found.rows), len(frames), squeeze=False)
    scale = _scale(found)
    for number, ((name, clip), line) in enumerate(zip(found.rows.items(), axes, strict=True)):
        energy = "energy" in name or name == "prediction of it"
        images = to_display_image(clip, spec, is_energy=energy, scale=scale["energy" if energy else "input"])
        for column, (ax, frame) in enumerate(zip(line, frames, strict=True)):
            ax.imshow(images[frame], interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            if column == 0:
                ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
            if number == 0:
                ax.set_title(f"frame {frame}", fontsize=8)
    ratio = found.loss / found.trivial if found.trivial else float("nan")
    figure.suptitle(f"{title}; target {spec.target}, loss {found.loss:.4f} ({ratio:.2f} of trivial)", fontsize=9)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write(image: np.ndarray, path: Path) -> None:
    """A PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imsave(path, image)


def _scale(found: Reconstruction) -> dict[str, float]:
    """Brightest value shown, of raw values and of energies: one for all rows, so that they compare."""
    spec, x = found.spec, found.rows["input"]
    raw = _denormalize(x, spec)
    largest = get_modality(spec.name).display_max(raw)
    energy = found.rows.get("target: motion energy")
    brightest = float((energy * _std(spec)).max()) if energy is not None else 1.0
    return {"input": max(largest, 1e-6), "energy": max(brightest, 1e-6)}


def _std(spec: ModalitySpec) -> Tensor:
    return torch.tensor(spec.std).view(-1, 1, 1, 1)


def _denormalize(x: Tensor, spec: ModalitySpec) -> Tensor:
    return x * _std(spec) + torch.tensor(spec.mean).view(-1, 1, 1, 1)


def to_display_image(clip: Tensor, spec: ModalitySpec, *, is_energy: bool, scale: float) -> np.ndarray:
    """Images for a person to look at. (C, T, H, W) -> float32 (T, H, W, 3) in [0, 1]; NaN becomes gray.

    The modality's `to_image` or, for motion energies, `energy_to_image` renders `clip` in its own units over `scale`.
    """
    hidden = clip.isnan().any(dim=0)[..., None].numpy()
    modality = get_modality(spec.name)
    values = torch.nan_to_num(clip * _std(spec) if is_energy else _denormalize(clip, spec)) / scale
    image = modality.energy_to_image(values) if is_energy else modality.to_image(values)
    return np.where(hidden, _GRAY, np.clip(image, 0, 1)).astype(np.float32)
