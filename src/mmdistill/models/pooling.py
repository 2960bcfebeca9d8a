"""From the tokens of a clip to its feature.

Shapes: B batch, N encoded tokens, L tokens of the grid (t, h, w), D width, T frames, M persons, J joints.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill.models import POOLINGS
from mmdistill.models.preprocessing import transform_keypoints

_NUM_PARTS = {"segments": 3, "halves": 2}


@dataclass(frozen=True)
class Pooling:
    """A mean over tokens, or several means that are concatenated; each has a LayerNorm without affine weights.

    Attributes:
        name: ``mean``: all tokens (MM-CDFSL, arXiv 2405.19917, section 3.3). ``motion`` and ``person``: weighted mean.
            ``last_k``: all tokens, which are the mean of the outputs of the last k blocks, each after the final norm.
            ``segments``: three parts, tokens at time i are in part ``floor(3 i / t)``. ``halves``: two parts, tokens in
            row i are in part ``floor(2 i / h)``.
        last_k: number of blocks k.

    Raises:
        ValueError: there is no such name.
    """

    name: str = "mean"
    last_k: int = 4

    def __post_init__(self) -> None:
        if self.name not in POOLINGS:
            raise ValueError(f"pooling={self.name} is not one of {', '.join(POOLINGS)}")

    def __str__(self) -> str:
        return f"last_k ({self.last_k})" if self.name == "last_k" else self.name

    @property
    def num_parts(self) -> int:
        """Number of means that are concatenated; the feature has the width num_parts * D."""
        return _NUM_PARTS.get(self.name, 1)

    @property
    def num_layers(self) -> int:
        """Number of blocks whose outputs are averaged; see `Encoder.forward`."""
        return self.last_k if self.name == "last_k" else 1

    @property
    def for_evaluation(self) -> "Pooling":
        """The pooling of an encoder that was trained with this one: the evaluation reads no skeletons."""
        return replace(self, name="mean") if self.name == "person" else self

    def describe_misfit(self, grid: tuple[int, int, int], depth: int) -> str:
        """Why it cannot be used with a token grid and a number of blocks; empty if it can."""
        if self.name == "segments" and grid[0] < 3:
            return f"needs at least 3 tokens along time, and the clips have {grid[0]}"
        if self.name == "halves" and grid[1] < 2:
            return f"needs at least 2 rows of tokens, and the clips have {grid[1]}"
        if self.num_layers > depth:
            return f"needs {self.last_k} blocks, and the encoder has {depth}"
        return ""

    def __call__(
        self, tokens: Tensor, visible: Tensor | None, grid: tuple[int, int, int], weights: Tensor | None = None
    ) -> Tensor:
        """Pool tokens. (B, N, D) -> (B, num_parts * D).

        A part without tokens, and tokens whose weights are all 0, have the mean of all tokens.

        Args:
            tokens: output of an encoder.
            visible: int64 (B, N), indices of these tokens in the grid; None: they are all tokens, N = L.
            grid: token grid (t, h, w).
            weights: with ``motion`` and ``person``: (B, L), not negative.

        Raises:
            ValueError: there are no weights.
        """
        if self.name in ("mean", "last_k"):
            means = [tokens.mean(dim=1)]
        else:
            means = [_weighted_mean(tokens, share) for share in self._shares(tokens, visible, grid, weights)]
        parts = [F.layer_norm(mean, mean.shape[1:], eps=1e-6) for mean in means]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _shares(
        self, tokens: Tensor, visible: Tensor | None, grid: tuple[int, int, int], weights: Tensor | None
    ) -> list[Tensor]:
        """The weight of each token in each part, (B, N) each."""
        t, h, w = grid
        if self.num_parts == 1:
            if weights is None:
                raise ValueError(f"pooling={self.name} needs weights of the tokens")
            weights = weights.to(tokens.device)
            return [weights if visible is None else weights.gather(1, visible)]
        index = torch.arange(t * h * w, device=tokens.device)[None] if visible is None else visible
        position, length = (index // (h * w), t) if self.name == "segments" else (index // w % h, h)
        part = (position * self.num_parts // length).expand(tokens.shape[0], -1)
        return [part == i for i in range(self.num_parts)]


def _weighted_mean(tokens: Tensor, share: Tensor) -> Tensor:
    """(B, N, D), (B, N) -> (B, D)."""
    share = share.float()
    share = torch.where(share.sum(dim=1, keepdim=True) > 0, share, 1.0)
    share = share / share.sum(dim=1, keepdim=True)
    return (tokens * share[..., None].to(tokens.dtype)).sum(dim=1)


def person_weights(joints: Tensor, crop_boxes: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """1 for the tokens that touch the bounding box of a person, else 0. float32 (B, L).

    The box of a person at one time of the grid contains the joints of its frames that have a score. Sides of a box lie
    at centers of joints, so it touches at least one token.

    Args:
        joints: (B, T, M, J, 3), rows (x, y, score) in px of the stored frame.
        crop_boxes: (B, 5), see `transform_keypoints`.
        grid: token grid (t, h, w) of the crop.

    Raises:
        ValueError: the input has no rows of keypoints.
    """
    if joints.ndim != 5 or joints.shape[4] != 3:
        raise ValueError("pooling=person needs skeletons that are stored as keypoints (x, y, score)")
    t, h, w = grid
    moved = transform_keypoints(joints.float(), crop_boxes, (h, w), flipped_joints=tuple(range(joints.shape[3])))
    moved = moved.unflatten(1, (t, -1)).transpose(2, 3).flatten(3, 4)  # (B, t, M, T / t * J, 3), in tokens
    is_present = moved.isfinite().all(dim=4) & (moved[..., 2] > 0)
    inside = torch.ones(1, device=joints.device, dtype=torch.bool)
    for axis, size in ((1, h), (0, w)):
        cell = (moved[..., axis] + 0.5).floor()
        first = torch.where(is_present, cell, torch.inf).amin(dim=3)[..., None]  # (B, t, M, 1)
        last = torch.where(is_present, cell, -torch.inf).amax(dim=3)[..., None]
        line = torch.arange(size, device=joints.device)
        on_axis = (line >= first) & (line <= last)  # (B, t, M, size)
        inside = inside & (on_axis[..., None] if axis else on_axis[..., None, :])
    return inside.any(dim=2).flatten(1).float()
