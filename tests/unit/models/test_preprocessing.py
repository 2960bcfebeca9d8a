"""Crops and heat-maps against float64 formulas."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdistill.modalities import get_modality, preprocess_clips
from mmdistill.models.preprocessing import crop_resize_flip, gaussian_1d, normalize, render_heatmaps

SKELETON = get_modality("skeleton").spec()
FLIPPED_JOINTS = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)  # left and right of COCO


def _boxes(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sigma", "mean", "std"), [(0.6, 0.0, 1.0), (0.5, 0.1, 0.2), (2.0, 0.0, 0.2), (9.0, -0.3, 3.0)]
)
def test_heatmaps_equal_their_formula(sigma: float, mean: float, std: float, device: str) -> None:
    """Joints inside, at the border, far outside, on half pixels, not finite, with a score below 0: in float64."""
    rng = np.random.default_rng(0)
    spec = dataclasses.replace(SKELETON, input_stride=4, sigma=sigma, mean=(mean,), std=(std,))
    joints = rng.uniform(-20, 80, size=(2, 3, 2, 17, 3))
    joints[..., 2] = rng.uniform(-0.1, 1, size=(2, 3, 2, 17))
    joints[0, 0, 0, 0] = np.nan
    joints[0, 1, 0, 1, 0], joints[0, 1, 0, 2, 1], joints[0, 1, 0, 3, 2] = np.inf, -np.inf, np.nan
    joints[0, 2, :, 4, :2] = [[1e30, 20], [-1e9, 20]]  # finite, but too large for an integer index
    joints[1, 0, :, 5, :2] = [[1.5, 3.5], [3.5, 7.5]]  # halfway between heat-map pixels, and on them
    boxes = _boxes((0, 2, 48, 64, 0), (3, 1, 48, 64, 1))
    given = torch.from_numpy(joints).float().to(device)
    out = preprocess_clips(given, boxes, spec, (12, 16)).cpu().double().numpy()
    expected = _expected_heatmaps(given.cpu().double().numpy(), boxes, sigma)
    np.testing.assert_allclose(out, (expected - mean) / std, atol=1e-5)
    assert (out[expected == 0] == np.float32(0 - mean) / np.float32(std)).all()


def _expected_heatmaps(joints: np.ndarray, boxes: torch.Tensor, sigma: float) -> np.ndarray:
    """float64 (2, 17, 3, 12, 16) for a heat-map scale of 4, one pixel at a time"""
    expected = np.zeros((2, 17, 3, 12, 16))
    ys, xs = np.mgrid[:12, :16]
    for b, t, m, j in np.ndindex(2, 3, 2, 17):
        top, left, flip = float(boxes[b, 0]), float(boxes[b, 1]), bool(boxes[b, 4])
        x, y, score = joints[b, t, m, j]
        if not np.isfinite([x, y, score]).all():
            continue
        x, y = (x + 0.5 - left) / 4 - 0.5, (y + 0.5 - top) / 4 - 0.5
        if flip:
            x, j = 15 - x, FLIPPED_JOINTS[j]
        value = max(score, 0) * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * sigma**2))
        value[(abs(xs - x) > 3 * sigma) | (abs(ys - y) > 3 * sigma)] = 0
        expected[b, j, t] = np.maximum(expected[b, j, t], value)
    return expected


def test_all_persons_are_rendered() -> None:
    joints = torch.zeros(1, 2, 2, 17, 3)
    joints[0, :, 0, 3] = torch.tensor([10.0, 10.0, 1.0])
    joints[0, :, 1, 3] = torch.tensor([30.0, 20.0, 0.5])
    heat = preprocess_clips(
        joints, _boxes((0, 0, 32, 48, 0)), dataclasses.replace(SKELETON, input_stride=1, sigma=1.0), (32, 48)
    )
    assert heat[0, 3, 0, 10, 10] == 1
    assert heat[0, 3, 0, 20, 30] == 0.5


def test_heatmap_values_are_computed_around_the_joints_only() -> None:
    """The largest intermediate tensor has S x S values per joint and person, not the size of the heat-maps."""
    joints = torch.rand(1, 16, 2, 17, 3) * torch.tensor([96.0, 56.0, 1.0])
    sizes: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Record():
        heat = render_heatmaps(joints, (56, 96), sigma=0.6, mean=(0.0,) * 17, std=(1.0,) * 17)
    window = 2 * math.floor(3 * 0.6 + 0.5) + 1
    assert max(size for size in sizes if size != heat.numel()) == 16 * 2 * 17 * window**2


@pytest.mark.parametrize("flip", [0, 1])
def test_fractional_crop_is_bilinear_with_pixel_centers_at_half_integers(flip: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(9, 11))
    top, left, height, width, (h, w) = 1.25, 2.5, 6.5, 7.0, (4, 5)
    x = torch.from_numpy(image).float().expand(1, 2, 3, 9, 11)
    found = crop_resize_flip(x, _boxes((top, left, height, width, flip)), (h, w))[0, 1, 2].numpy()
    for i, j in np.ndindex(h, w):
        y = top + (i + 0.5) * height / h - 0.5
        z = left + ((w - 1 - j if flip else j) + 0.5) * width / w - 0.5
        y0, z0 = int(np.floor(y)), int(np.floor(z))
        a, b = y - y0, z - z0
        rows, columns = np.clip([y0, y0 + 1], 0, 8), np.clip([z0, z0 + 1], 0, 10)
        (p, q), (r, t) = image[np.ix_(rows, columns)]
        assert found[i, j] == pytest.approx((1 - a) * ((1 - b) * p + b * q) + a * ((1 - b) * r + b * t), abs=1e-5)


def test_normalize_is_per_channel_and_in_place() -> None:
    x = torch.ones(2, 2, 3, 4, 4)
    out = normalize(x, (1.0, -2.0), (2.0, 4.0))
    assert out is x
    assert torch.equal(out[:, 0], torch.zeros(2, 3, 4, 4))
    assert torch.equal(out[:, 1], torch.full((2, 3, 4, 4), 0.75))


def test_gaussian_is_zero_outside_the_image_at_a_valid_index() -> None:
    value, pixel = gaussian_1d(torch.tensor([-1.0, 2.0, 1e20]), 4, 0.5)
    assert value[1].tolist() == pytest.approx([np.exp(-2 * d * d) if abs(d) <= 1.5 else 0 for d in range(-2, 3)])
    assert pixel.min() >= 0
    assert pixel.max() <= 3
    assert value[0].tolist() == pytest.approx([0, 0, 0, np.exp(-2), 0])
    assert value[2].sum() == 0


def test_clip_without_persons_raises() -> None:
    with pytest.raises(ValueError, match="0 persons"):
        render_heatmaps(torch.zeros(1, 2, 0, 17, 3), (8, 8), sigma=1.0, mean=(0.0,) * 17, std=(1.0,) * 17)
