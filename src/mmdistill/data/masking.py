"""Token masks. Every clip has the same number of visible tokens, so that batches stay rectangular.

Masks are passed on as indices of visible tokens. In a boolean mask, 0 means keep and 1 means remove.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdistill.errors import format_count
from mmdistill.randomness import seeded_rng


@dataclass(frozen=True)
class MaskSpec:
    """Token grid (t, h, w) and mask of a dataset; see `sample_visible_tokens`, which also gives the errors."""

    grid: tuple[int, int, int]
    mask_type: str = "tube"
    mask_ratio: float = 0.0
    mask_temperature: float = 1.0

    def __post_init__(self) -> None:
        self._sample_any()  # checks the values

    @property
    def num_visible(self) -> int:
        """Number of visible tokens, which is that of every clip."""
        return len(self._sample_any())

    def _sample_any(self) -> np.ndarray:
        return self.sample(seeded_rng(0), np.ones(math.prod(self.grid)))

    def sample(self, rng: np.random.Generator, weights: np.ndarray | None = None) -> np.ndarray:
        """The visible tokens of one clip, int64 [L_vis], sorted; `weights` are those of its tokens."""
        settings: dict[str, Any] = {"ratio": self.mask_ratio, "mask_type": self.mask_type}
        return sample_visible_tokens(self.grid, **settings, rng=rng, weights=weights, temperature=self.mask_temperature)


def sample_visible_tokens(
    grid: tuple[int, int, int],
    *,
    ratio: float,
    mask_type: str,
    rng: np.random.Generator,
    weights: np.ndarray | None = None,
    temperature: float = 1.0,
) -> np.ndarray:
    """Draw the visible tokens of a clip.

    Args:
        grid: tokens along (t, h, w).
        ratio: fraction of tokens that are removed. `round` rounds halves to even.
        mask_type: ``tube`` removes the same ``round(ratio * h * w)`` positions at all times (VideoMAE, arXiv
            2203.12602, section 3.2). ``random`` removes ``round(ratio * t * h * w)`` tokens. ``motion`` keeps the same
            number as ``random``, drawn one after another without replacement, each with a probability proportional to
            ``weight ** (1 / temperature)`` among the tokens that are left.
        rng: generator of the clip.
        weights: with ``motion``: float [t * h * w], positive, see `data.motion.token_weights`.
        temperature: with ``motion``: below 1 moving tokens are drawn more often, above 1 less; infinity is ``random``.

    Returns:
        int64 [L_vis], sorted token indices (t major, then h, then w).

    Raises:
        ValueError: the mask type is unknown, the ratio is outside [0, 1), it leaves no visible token, or ``motion`` has
            no weights.
    """
    if mask_type not in ("tube", "random", "motion"):
        raise ValueError(f"mask_type={mask_type!r} is not one of tube, random, motion")
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1)")
    t, h, w = grid
    count = h * w if mask_type == "tube" else t * h * w
    removed = round(ratio * count)
    if removed == count:
        raise ValueError(f"mask ratio {ratio} leaves none of {format_count(count, 'token')} visible")
    if mask_type == "motion":
        if weights is None:
            raise ValueError("mask_type=motion needs the motion of the clip")
        # Gumbel top-k (arXiv 1903.06059): the tokens with the largest keys are such a sample without replacement
        keys = np.log(weights) / temperature + rng.gumbel(size=count)
        return np.sort(np.argsort(keys, kind="stable")[removed:]).astype(np.int64)
    kept: np.ndarray = np.sort(rng.permutation(count)[removed:]).astype(np.int64)
    return kept if mask_type == "random" else (np.arange(t)[:, None] * count + kept).reshape(-1)


def sample_decoder_tokens(removed: int, *, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the removed tokens that the decoder reconstructs (dual masking, VideoMAE V2, arXiv 2303.16727, section 3.2).

    `ratio` is the fraction of the `removed` tokens that is not reconstructed. `rng` is the generator of the clip, so
    that the draw depends neither on the batch nor on the number of processes. The result is int64
    [max(1, round(removed * (1 - ratio)))], sorted numbers between 0 and removed - 1.
    """
    return np.sort(rng.permutation(removed)[: max(1, round(removed * (1 - ratio)))])
