"""Masks: a constant number of visible tokens, tubes through time, and a uniform distribution."""

from collections import Counter

import numpy as np
import pytest

from mmdistill.data.masking import sample_decoder_tokens, sample_visible_tokens


@pytest.mark.parametrize("kind", ["tube", "random"])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9, 0.95])
def test_number_of_visible_tokens_is_constant(kind: str, ratio: float) -> None:
    grid = (8, 14, 24)
    unit = 14 * 24 if kind == "tube" else 8 * 14 * 24
    expected = (unit - round(ratio * unit)) * (8 if kind == "tube" else 1)
    for seed in range(20):
        got = sample_visible_tokens(grid, ratio=ratio, mask_type=kind, rng=np.random.default_rng(seed))
        assert got.dtype == np.int64
        assert len(got) == expected
        assert (np.diff(got) > 0).all()
        assert got[0] >= 0
        assert got[-1] < 8 * 14 * 24


def test_tube_has_the_same_positions_at_all_times() -> None:
    got = sample_visible_tokens((4, 3, 5), ratio=0.6, mask_type="tube", rng=np.random.default_rng(0)).reshape(4, -1)
    assert (got - np.arange(4)[:, None] * 15 == got[0]).all()


@pytest.mark.parametrize("kind", ["tube", "random"])
def test_every_token_is_visible_equally_often(kind: str) -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(2 * 3 * 4)
    for _ in range(4000):
        counts[sample_visible_tokens((2, 3, 4), ratio=0.75, mask_type=kind, rng=rng)] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 0.03  # 4 sigma of a binomial


@pytest.mark.parametrize("kind", ["tube", "random", "motion"])
def test_every_pair_of_four_is_visible_equally_often(kind: str) -> None:
    """Two of four positions: each of the 6 pairs has the probability 1/6. `motion` at an infinite temperature."""
    grid, rng, counts = (
        ((2, 2, 2) if kind == "tube" else (1, 2, 2)),
        np.random.default_rng(0),
        Counter[tuple[int, ...]](),
    )
    more = {"weights": np.array([0.01, 0.1, 1.0, 9.0]), "temperature": np.inf} if kind == "motion" else {}
    for _ in range(3000):
        drawn = sample_visible_tokens(grid, ratio=0.5, mask_type=kind, rng=rng, **more)
        counts[tuple(drawn[:2].tolist())] += 1
        assert drawn.tolist() == [*drawn[:2], *(drawn[:2] + 4)] if kind == "tube" else len(drawn) == 2
    assert sorted(counts) == [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert max(abs(count / 3000 - 1 / 6) for count in counts.values()) < 0.028  # 4 sigma of a binomial


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_motion_draws_without_replacement_by_weight(temperature: float) -> None:
    """Two of four tokens, drawn one after the other: P(i) = p_i + sum_j p_j p_i / (1 - p_j)."""
    weights = np.array([0.1, 0.4, 1.5, 2.0])
    p = weights ** (1 / temperature) / (weights ** (1 / temperature)).sum()
    expected = [p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)]
    counts, rng, more = np.zeros(4), np.random.default_rng(0), {"weights": weights, "temperature": temperature}
    for _ in range(6000):
        drawn = sample_visible_tokens((1, 2, 2), ratio=0.5, mask_type="motion", rng=rng, **more)
        assert drawn.dtype == np.int64
        assert drawn[0] < drawn[1]
        counts[drawn] += 1
    assert np.abs(counts / 6000 - expected).max() < 0.026  # 4 sigma of a binomial


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9, 0.95])
def test_motion_keeps_as_many_tokens_as_random(ratio: float) -> None:
    grid = (8, 14, 24)
    for seed in range(5):
        weights = np.random.default_rng(seed).random(8 * 14 * 24) + 0.01
        rng = np.random.default_rng(seed)
        drawn = sample_visible_tokens(grid, ratio=ratio, mask_type="motion", rng=rng, weights=weights)
        assert len(set(drawn.tolist())) == 8 * 14 * 24 - round(ratio * 8 * 14 * 24)


def test_a_low_temperature_keeps_the_moving_tokens() -> None:
    weights = np.r_[np.full(12, 0.01), np.full(4, 3.0)]
    settings = {"ratio": 0.75, "mask_type": "motion", "weights": weights, "temperature": 0.01}
    rng = np.random.default_rng(0)
    assert sample_visible_tokens((1, 4, 4), rng=rng, **settings).tolist() == [12, 13, 14, 15]


def test_invalid_masks_raise() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="tube, random, motion"):
        sample_visible_tokens((2, 2, 2), ratio=0.5, mask_type="block", rng=rng)
    with pytest.raises(ValueError, match="mask_type=motion needs the motion of the clip"):
        sample_visible_tokens((2, 2, 2), ratio=0.5, mask_type="motion", rng=rng)
    with pytest.raises(ValueError, match="must lie in"):
        sample_visible_tokens((2, 2, 2), ratio=1.0, mask_type="tube", rng=rng)
    with pytest.raises(ValueError, match="leaves none"):
        sample_visible_tokens((2, 2, 2), ratio=0.9, mask_type="tube", rng=rng)


def test_decoder_tokens_are_sampled_uniformly() -> None:
    counts = np.zeros(10)
    for seed in range(2000):
        sampled = sample_decoder_tokens(10, ratio=0.7, rng=np.random.default_rng(seed))
        assert sampled.dtype == np.int64
        assert len(sampled) == len(set(sampled)) == 3
        assert (np.diff(sampled) > 0).all()
        counts[sampled] += 1
    assert abs(counts / 2000 - 0.3).max() < 0.05  # five standard errors
    assert len(sample_decoder_tokens(10, ratio=0.99, rng=np.random.default_rng(0))) == 1
