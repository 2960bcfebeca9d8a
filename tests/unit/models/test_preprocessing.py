"""Raw clips to model inputs: exact crops, one view for all modalities, heat-maps against a float64 formula."""

import dataclasses
import time

import numpy as np
import pytest
import torch

from mmdistill.modalities import ModalitySpec, get_modality, preprocess_clips
from mmdistill.modalities.skeleton import FLIPPED_JOINTS

RGB, FLOW, SKELETON = (get_modality(m).spec() for m in ("rgb", "flow", "skeleton"))
PLAIN_RGB = ModalitySpec("rgb", 3, 1, (0.0,), (1.0,), "pixel")


def _view(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_rgb_crop_is_exact_and_normalised() -> None:
    clip = torch.randint(0, 256, (2, 2, 10, 12, 3), dtype=torch.uint8)
    x = preprocess_clips(clip, _view((1, 3, 8, 8, 0), (2, 4, 8, 8, 1)), RGB, (8, 8))
    first = (clip[0, :, 1:9, 3:11].numpy() / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    second = (clip[1, :, 2:10, 4:12].numpy()[:, :, ::-1] / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    np.testing.assert_allclose(x[0].permute(1, 2, 3, 0).numpy(), first, atol=1e-5)
    np.testing.assert_allclose(x[1].permute(1, 2, 3, 0).numpy(), second, atol=1e-5)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("crop", [(0, 0, 24, 32), (4, 8, 24, 32), (4, 6, 12, 16), (3, 5, 18, 24)])
def test_dot_flow_and_joint_stay_on_one_pixel(flip: int, crop: tuple[int, int, int, int]) -> None:
    """A dot moves over numbered frames; after any view its pixel, its flow and its joint agree in every frame."""
    height, width, frames, size = 32, 48, 4, (24, 32)
    clip = torch.zeros(1, frames, height, width, 3, dtype=torch.uint8)
    flow = torch.zeros(1, frames, 2, height, width)
    joints = torch.zeros(1, frames, 1, 17, 3)
    for k in range(frames):
        x, y = 10 + 2 * k, 8 + k
        clip[0, k, y - 1 : y + 2, x - 1 : x + 2] = 255
        flow[0, k, 0, y - 1 : y + 2, x - 1 : x + 2] = 2
        flow[0, k, 1, y - 1 : y + 2, x - 1 : x + 2] = 1
        joints[0, k, 0, 9] = torch.tensor([x, y, 1.0])  # the left wrist
    view = _view((*crop, flip))
    skeleton = dataclasses.replace(SKELETON, input_stride=1, sigma=1.0)
    pixels = preprocess_clips(clip, view, PLAIN_RGB, size)[0, 0]
    moved = preprocess_clips(flow, view, FLOW, size)[0]
    joint = FLIPPED_JOINTS[9] if flip else 9
    heat = preprocess_clips(joints, view, skeleton, size)[0, joint]
    zoom = size[0] / crop[2]
    for k in range(frames):
        if pixels[k].max() < 0.5:
            pytest.fail(f"frame {k}: the dot left the crop; the test's geometry is wrong")
        ys, xs = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
        centre = [float((pixels[k] * axis).sum() / pixels[k].sum()) for axis in (ys, xs)]
        at = divmod(int(heat[k].argmax()), size[1])
        assert abs(at[0] - centre[0]) <= 0.75
        assert abs(at[1] - centre[1]) <= 0.75
        y, x = round(centre[0]), round(centre[1])
        assert float(moved[0, k, y, x]) == pytest.approx((-2 if flip else 2) * zoom, rel=0.05)
        assert float(moved[1, k, y, x]) == pytest.approx(zoom, rel=0.05)
    other = 9 if flip else FLIPPED_JOINTS[9]
    assert preprocess_clips(joints, view, skeleton, size)[0, other].max() == 0


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sigma", "mean", "std"), [(0.6, 0.0, 1.0), (0.5, 0.1, 0.2), (2.0, 0.0, 0.2), (9.0, -0.3, 3.0)]
)
def test_heatmaps_equal_a_direct_formula(sigma: float, mean: float, std: float, device: str) -> None:
    """Joints inside, at the border, far outside, on half pixels, not finite, with a score below 0: in float64."""
    rng = np.random.default_rng(0)
    spec = dataclasses.replace(SKELETON, input_stride=4, sigma=sigma, mean=(mean,), std=(std,))
    joints = rng.uniform(-20, 80, size=(2, 3, 2, 17, 3))
    joints[..., 2] = rng.uniform(-0.1, 1, size=(2, 3, 2, 17))
    joints[0, 0, 0, 0] = np.nan
    joints[0, 1, 0, 1, 0], joints[0, 1, 0, 2, 1], joints[0, 1, 0, 3, 2] = np.inf, -np.inf, np.nan
    joints[0, 2, :, 4, :2] = [[1e30, 20], [-1e9, 20]]  # finite, but no whole number that would fit an index
    joints[1, 0, :, 5, :2] = [[1.5, 3.5], [3.5, 7.5]]  # half-way between heat-map pixels, and on them
    view = _view((0, 2, 48, 64, 0), (3, 1, 48, 64, 1))
    given = torch.from_numpy(joints).float().to(device)
    out = preprocess_clips(given, view, spec, (12, 16)).cpu().double().numpy()
    expected = _heat_by_formula(given.cpu().double().numpy(), view, sigma)
    np.testing.assert_allclose(out, (expected - mean) / std, atol=1e-5)
    assert (out[expected == 0] == np.float32(0 - mean) / np.float32(std)).all()


def _heat_by_formula(joints: np.ndarray, view: torch.Tensor, sigma: float) -> np.ndarray:
    """float64 (2, 17, 3, 12, 16) for a heat-map scale of 4, one pixel at a time"""
    expected = np.zeros((2, 17, 3, 12, 16))
    ys, xs = np.mgrid[:12, :16]
    for b, t, m, j in np.ndindex(2, 3, 2, 17):
        top, left, flip = float(view[b, 0]), float(view[b, 1]), bool(view[b, 4])
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


def test_heatmaps_cost_at_most_5_ms_per_clip_and_core() -> None:
    """CPU time, which a busy machine inflates: of many tries one is enough (0.7 ms on a quiet one)."""
    joints = torch.rand(1, 16, 2, 17, 3) * torch.tensor([384.0, 224.0, 1.0])
    view = _view((0, 0, 224, 384, 0))

    def seconds() -> float:
        start = time.process_time()
        preprocess_clips(joints, view, SKELETON, (56, 96))
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would spin while they wait for each other
    try:
        assert any(seconds() < 0.005 for _ in range(200))
    finally:
        torch.set_num_threads(threads)


def test_both_players_are_drawn() -> None:
    joints = torch.zeros(1, 2, 2, 17, 3)
    joints[0, :, 0, 3] = torch.tensor([10.0, 10.0, 1.0])
    joints[0, :, 1, 3] = torch.tensor([30.0, 20.0, 0.5])
    heat = preprocess_clips(
        joints, _view((0, 0, 32, 48, 0)), dataclasses.replace(SKELETON, input_stride=1, sigma=1.0), (32, 48)
    )
    assert heat[0, 3, 0, 10, 10] == 1
    assert heat[0, 3, 0, 20, 30] == 0.5


def test_statistics_are_applied_to_every_modality() -> None:
    spec = dataclasses.replace(FLOW, mean=(1.0, -2.0), std=(2.0, 4.0))
    x = preprocess_clips(torch.ones(1, 2, 2, 8, 8), _view((0, 0, 8, 8, 0)), spec, (8, 8))
    assert torch.equal(x[0, 0], torch.zeros(2, 8, 8))
    assert torch.equal(x[0, 1], torch.full((2, 8, 8), 0.75))
