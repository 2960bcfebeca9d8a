"""Pooling of tokens, against loops over tokens."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdistill.models.pooling import Pooling, person_weights
from mmdistill.models.videomae import Encoder, EncoderConfig

GRID = (4, 3, 2)


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()


def weighted_mean(tokens: Tensor, weights: list[float]) -> Tensor:
    return layer_norm(sum(w * x for w, x in zip(weights, tokens, strict=True)) / sum(weights))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def visible() -> Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([np.sort(rng.permutation(24)[:9]) for _ in range(2)]))


def test_mean_and_last_k_are_the_norm_of_the_mean(tokens: Tensor, visible: Tensor) -> None:
    for name in ("mean", "last_k"):
        pooled = Pooling(name)(tokens, visible, GRID)
        torch.testing.assert_close(pooled, torch.stack([weighted_mean(clip, [1] * 9) for clip in tokens]))


@pytest.mark.parametrize("name", ["motion", "person"])
def test_weighted_mean_uses_the_weights_of_the_visible_tokens(name: str, tokens: Tensor, visible: Tensor) -> None:
    weights = torch.rand(2, 24, generator=torch.Generator().manual_seed(1))
    weights[1, visible[1]] = 0  # as if no person were visible: the mean
    expected = [[float(weights[0, i]) for i in visible[0]], [1.0] * 9]
    pooled = Pooling(name)(tokens, visible, GRID, weights)
    torch.testing.assert_close(
        pooled, torch.stack([weighted_mean(*pair) for pair in zip(tokens, expected, strict=True)])
    )
    whole = torch.randn(2, 24, 8)
    torch.testing.assert_close(
        Pooling(name)(whole, None, GRID, weights[:1].expand(2, -1)),
        torch.stack([weighted_mean(clip, weights[0].tolist()) for clip in whole]),
    )
    with pytest.raises(ValueError, match=f"pooling={name} needs weights"):
        Pooling(name)(tokens, visible, GRID)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("segments", [[0, 1], [2], [3]]),  # times of a grid of 4
        ("halves", [[0, 1], [2]]),  # rows of a grid of 3
    ],
)
def test_parts_are_concatenated_in_order(name: str, parts: list[list[int]], tokens: Tensor, visible: Tensor) -> None:
    position = {"segments": lambda i: i // 6, "halves": lambda i: i // 2 % 3}[name]
    visible[1] = torch.arange(9)  # times 0 and 1 only: the last segment has no token
    rows = []
    for clip, index in zip(tokens, visible.tolist(), strict=True):
        means = []
        for part in parts:
            own = [x for x, i in zip(clip, index, strict=True) if position(i) in part]
            means.append(weighted_mean(own or list(clip), [1] * len(own or clip)))
        rows.append(torch.cat(means))
    pooled = Pooling(name)(tokens, visible, GRID)
    assert pooled.shape == (2, 8 * len(parts)) == (2, 8 * Pooling(name).num_parts)
    torch.testing.assert_close(pooled, torch.stack(rows))
    whole = torch.randn(2, 24, 8)
    every = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(Pooling(name)(whole, None, GRID), Pooling(name)(whole, every, GRID))


def test_last_k_averages_the_normalized_outputs_of_the_last_blocks() -> None:
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(3, 4, 16, 16, 8, 2, dim=16, depth=3, heads=2, head_dim=8, mlp_dim=32))
    torch.nn.init.normal_(encoder.norm.weight)
    outputs: list[Tensor] = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    feature = encoder.embed(torch.randn(2, 3, 4, 16, 16), None, Pooling("last_k", 2))
    normalized = [encoder.norm(x).mean(dim=1) for x in outputs[1:]]
    torch.testing.assert_close(feature, torch.stack([layer_norm(x) for x in (normalized[0] + normalized[1]) / 2]))


def test_person_weights_mark_the_tokens_of_the_boxes() -> None:
    """A grid of 2 x 3 x 4 tokens of 2 x 8 x 8 px, and a crop that begins at (2, 4) and is flipped for one clip."""
    rng = np.random.default_rng(3)
    joints = torch.from_numpy(rng.uniform(0, 36, (2, 4, 2, 5, 3))).float()
    joints[..., 2] = torch.from_numpy(rng.integers(0, 2, (2, 4, 2, 5)))
    joints[..., :2] = joints[..., :2] * 0.3 + torch.tensor([[3.0, 4.0], [18.0, 14.0]])[None, None, :, None]
    joints[1, 2:, 1, :, 2] = 0  # this person is absent in the second half
    joints[0, 0, 0, 0, 0] = torch.nan
    boxes = torch.tensor([[2.0, 4, 24, 32, 0], [2.0, 4, 24, 32, 1]])
    expected = np.zeros((2, 2, 3, 4))
    for b in range(2):
        for t in range(2):
            for person in range(2):
                xy = []
                for x, y, score in joints[b, 2 * t : 2 * t + 2, person].reshape(-1, 3).tolist():
                    if score > 0 and np.isfinite(x):
                        column = (x + 0.5 - 4) / 8
                        xy.append((4 - column if b else column, (y + 0.5 - 2) / 8))
                for row in range(3):
                    for column in range(4):
                        (left, top), (right, bottom) = (
                            np.floor(np.min(xy, 0)) if xy else (9, 9),
                            (np.floor(np.max(xy, 0)) if xy else (-9, -9)),
                        )
                        if left <= column <= right and top <= row <= bottom:
                            expected[b, t, row, column] = 1
    weights = person_weights(joints, boxes, (2, 3, 4))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(weights.numpy(), expected.reshape(2, -1))
    with pytest.raises(ValueError, match="stored as keypoints"):
        person_weights(torch.zeros(2, 4, 17, 8, 8), boxes, (2, 3, 4))


def test_poolings_that_do_not_fit_are_described() -> None:
    assert Pooling("segments").describe_misfit((2, 4, 4), 4) == (
        "needs at least 3 tokens along time, and the clips have 2"
    )
    assert "at least 2 rows" in Pooling("halves").describe_misfit((4, 1, 4), 4)
    assert "needs 5 blocks, and the encoder has 4" in Pooling("last_k", 5).describe_misfit(GRID, 4)
    assert not any(Pooling(name).describe_misfit(GRID, 4) for name in ("mean", "last_k", "segments", "halves"))
    with pytest.raises(ValueError, match="pooling=max is not one of mean, motion, last_k, segments, halves, person"):
        Pooling("max")
