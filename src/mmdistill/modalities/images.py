"""Clips of any modality as images, and the layout of such images in a figure.

Shapes: C channels, T frames, H x W pixels.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mmdistill.console import log_once
from mmdistill.modalities.base import ModalitySpec, get_modality

_GRAY = 0.5  # of hidden pixels
_HIGHLIGHT = (1.0, 0.85, 0.0)  # RGB of a modality without colors that is drawn over frames


def display_scale(clip: Tensor, spec: ModalitySpec, *, is_energy: bool = False) -> float:
    """The value, in the modality's units, that `render_clip` shows at full brightness. `clip` is (C, T, H, W)."""
    values = torch.nan_to_num(_to_units(clip, spec, is_energy=is_energy))
    return max(float(values.max()) if is_energy else get_modality(spec.name).display_max(values), 1e-6)


def render_clip(clip: Tensor, spec: ModalitySpec, *, is_energy: bool = False, scale: float | None = None) -> np.ndarray:
    """Images of a clip of any modality. (C, T, H, W) -> float32 (T, H, W, 3) in [0, 1].

    `clip` has normalized values, or motion energies of them. NaN is a hidden value and becomes gray. The modality's
    `to_image` or `energy_to_image` chooses the colors. `scale` is a `display_scale`; None: that of the clip.
    """
    hidden = clip.isnan().any(dim=0)[..., None].numpy()
    shown = torch.nan_to_num(_to_units(clip, spec, is_energy=is_energy))
    shown = shown / (display_scale(clip, spec, is_energy=is_energy) if scale is None else scale)
    modality = get_modality(spec.name)
    image = modality.energy_to_image(shown) if is_energy else modality.to_image(shown)
    return np.where(hidden, _GRAY, np.clip(image, 0, 1)).astype(np.float32)


def hide_removed_tokens(clip: Tensor, visible: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The clip with NaN in the tokens that a mask removes.

    Args:
        clip: (C, T, H, W) float.
        visible: int64 (L_vis,), indices of the visible tokens (t major, then h, then w).
        grid: number of tokens along (t, h, w), which divide T, H and W.
    """
    is_visible = torch.zeros(math.prod(grid), dtype=torch.bool, device=clip.device)
    is_visible[visible] = True
    shown = is_visible.view(grid)
    for axis, (size, tokens) in enumerate(zip(clip.shape[1:], grid, strict=True)):
        shown = shown.repeat_interleave(size // tokens, dim=axis)
    return torch.where(shown, clip, torch.nan)


def draw_over_frames(frames: np.ndarray, clip: Tensor, spec: ModalitySpec) -> np.ndarray:
    """Frames with a clip of another modality drawn over them, for example joints or flow.

    Args:
        frames: float32 (T, H, W, 3) in [0, 1].
        clip: (C, T, h, w), normalized values, as in `render_clip`. It is resized to the frames.
        spec: of the clip.

    Returns:
        float32 (T, H, W, 3). The opacity of a pixel is the difference of its color from the color of the value 0 (no
        motion, no joint). A modality that is displayed in gray is drawn in yellow.
    """
    zero = (-torch.tensor(spec.mean) / torch.tensor(spec.std)).view(-1, 1, 1, 1)
    images, background = render_clip(clip, spec), render_clip(zero, spec, scale=1.0)
    opacity = np.abs(images - background).max(axis=3, keepdims=True)
    is_gray = np.ptp(images, axis=3).max() == 0
    colors = np.broadcast_to(np.array(_HIGHLIGHT, np.float32), images.shape) if is_gray else images
    layers = np.concatenate((colors, opacity), axis=3)
    layers = np.stack([cv2.resize(layer, frames.shape[2:0:-1], interpolation=cv2.INTER_LINEAR) for layer in layers])
    drawn: np.ndarray = frames * (1 - layers[..., 3:]) + layers[..., :3] * layers[..., 3:]
    return drawn


def _to_units(clip: Tensor, spec: ModalitySpec, *, is_energy: bool) -> Tensor:
    """Normalized values in the modality's units. An energy has no mean."""
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (spec.mean, spec.std))
    return clip * std if is_energy else clip * std + mean


@functools.cache
def choose_fonts(text: str) -> tuple[list[str], frozenset[str]]:
    """Font families of matplotlib for a text in any language, and the characters that no installed font has."""
    from matplotlib import font_manager

    def characters_of(path: str) -> set[str]:
        return {chr(code) for code in font_manager.get_font(path).get_charmap()}

    families = ["DejaVu Sans"]  # part of matplotlib
    missing = {c for c in text if c.isprintable()} - characters_of(font_manager.findfont(families[0]))
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        if "LastResort" in font.fname:  # of matplotlib: it draws boxes
            continue
        if found := missing & characters_of(font.fname):
            families.append(font.name)
            missing -= found
    return families, frozenset(missing)


def set_figure_title(figure: Any, text: str, fontsize: float) -> None:
    """Set the title of a matplotlib figure. A character that no installed font has is shown as its code."""
    families, missing = choose_fonts(text)
    if missing:
        shown = "".join(sorted(missing))
        log_once(f"no installed font has the characters {shown}: the images show their codes; install a font with them")
    text = "".join(f"\\u{ord(c):04x}" if c in missing else c for c in text)
    figure.suptitle(text, fontsize=fontsize, fontfamily=families)


def draw_image_grid(
    figure: Any, rows: Mapping[str, Sequence[np.ndarray]], titles: Sequence[str], *, fontsize: float = 8
) -> None:
    """Fill a matplotlib figure or subfigure with images (H, W, 3): a row per entry, a column per title."""
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for (name, images), row_axes in zip(rows.items(), axes, strict=True):
        for ax, image in zip(row_axes, images, strict=True):
            ax.imshow(image, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=fontsize)
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=fontsize)
