"""Which tokens a clip shows. The same number for every clip, so that batches stay rectangular.

0 means keep and 1 means remove wherever a boolean mask appears; what is handed on here are the indices that are kept.
"""

import numpy as np


def sample_visible_tokens(
    grid: tuple[int, int, int], *, ratio: float, mask_type: str, rng: np.random.Generator
) -> np.ndarray:
    """Sorted indices of the visible tokens of a (t, h, w) grid, t major, then h, then w.

    `tube` removes ``round(ratio * h * w)`` places for all times (VideoMAE, arXiv 2203.12602, section 3.2); `random`
    removes ``round(ratio * t * h * w)`` tokens. Halves round to even, as Python's `round` does.

    Returns:
        int64 [L_vis].

    Raises:
        ValueError: for another `kind`, a ratio outside [0, 1), or one that leaves nothing visible.
    """
    t, h, w = grid
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio} must lie in [0, 1)")
    if mask_type == "tube":
        kept = _kept(h * w, ratio, rng)
        return (np.arange(t, dtype=np.int64)[:, None] * (h * w) + kept).reshape(-1)
    if mask_type == "random":
        return _kept(t * h * w, ratio, rng)
    raise ValueError(f"mask_type={mask_type!r} is not one of tube, random")


def _kept(count: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    removed = round(ratio * count)
    if removed == count:
        raise ValueError(f"mask ratio {ratio} leaves none of {count} tokens visible")
    return np.sort(rng.permutation(count)[removed:]).astype(np.int64)


def sample_decoder_tokens(removed: int, *, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """A clip's removed tokens that are reconstructed under dual masking (VideoMAE V2, arXiv 2303.16727, section 3.2).

    Args:
        removed: N, how many there are.
        ratio: fraction of them that is left out.
        rng: the clip's own, so that neither batch mates nor the number of processes change its draw.

    Returns:
        max(1, round(N * (1 - ratio))) of the numbers 0 to N - 1, sorted, int64
    """
    return np.sort(rng.permutation(removed)[: max(1, round(removed * (1 - ratio)))])
