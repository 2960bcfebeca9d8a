"""Raw clips to model inputs: exact crops, one view for all modalities, heat-maps against a float64 formula."""

import dataclasses

import numpy as np
import pytest
import torch

from mmdistill.modality import MODALITY_SPECS, ModalitySpec
from mmdistill.models.inputs import FLIPPED_JOINTS, prepare

RGB, FLOW, SKELETON = (MODALITY_SPECS[m] for m in ("rgb", "flow", "skeleton"))
PLAIN_RGB = ModalitySpec("rgb", 3, 1, (0.0,), (1.0,), "pixel")


def _view(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def test_rgb_crop_is_exact_and_normalised() -> None:
    clip = torch.randint(0, 256, (2, 2, 10, 12, 3), dtype=torch.uint8)
    x = prepare(clip, _view((1, 3, 8, 8, 0), (2, 4, 8, 8, 1)), RGB, (8, 8))
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
    skeleton = dataclasses.replace(SKELETON, scale=1, sigma=1.0)
    pixels = prepare(clip, view, PLAIN_RGB, size)[0, 0]
    moved = prepare(flow, view, FLOW, size)[0]
    joint = FLIPPED_JOINTS[9] if flip else 9
    heat = prepare(joints, view, skeleton, size)[0, joint]
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
    assert prepare(joints, view, skeleton, size)[0, other].max() == 0


def test_heatmaps_equal_a_direct_formula() -> None:
    rng = np.random.default_rng(0)
    spec = dataclasses.replace(SKELETON, scale=4, sigma=0.6)
    joints = rng.uniform(-4, 60, size=(2, 3, 2, 17, 3))
    joints[..., 2] = rng.uniform(0, 1, size=(2, 3, 2, 17))
    joints[0, 0, 0, 0] = np.nan
    view = _view((0, 2, 48, 64, 0), (3, 1, 48, 64, 1))
    out = prepare(torch.from_numpy(joints).float(), view, spec, (12, 16)).double().numpy()
    expected = np.zeros((2, 17, 3, 12, 16))
    for b in range(2):
        top, left, flip = float(view[b, 0]), float(view[b, 1]), bool(view[b, 4])
        for t in range(3):
            for m in range(2):
                for j in range(17):
                    x, y, score = joints[b, t, m, j].astype(np.float32).astype(np.float64)
                    if not np.isfinite([x, y, score]).all():
                        continue
                    x, y = (x + 0.5 - left) / 4 - 0.5, (y + 0.5 - top) / 4 - 0.5
                    channel = j
                    if flip:
                        x, channel = 15 - x, FLIPPED_JOINTS[j]
                    for row in range(12):
                        for column in range(16):
                            if abs(column - x) <= 1.8 and abs(row - y) <= 1.8:
                                value = score * np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * 0.6**2))
                                expected[b, channel, t, row, column] = max(expected[b, channel, t, row, column], value)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert (out[expected == 0] == 0).all()


def test_both_players_are_drawn() -> None:
    joints = torch.zeros(1, 2, 2, 17, 3)
    joints[0, :, 0, 3] = torch.tensor([10.0, 10.0, 1.0])
    joints[0, :, 1, 3] = torch.tensor([30.0, 20.0, 0.5])
    heat = prepare(joints, _view((0, 0, 32, 48, 0)), dataclasses.replace(SKELETON, scale=1, sigma=1.0), (32, 48))
    assert heat[0, 3, 0, 10, 10] == 1
    assert heat[0, 3, 0, 20, 30] == 0.5


def test_statistics_are_applied_to_every_modality() -> None:
    spec = dataclasses.replace(FLOW, mean=(1.0, -2.0), std=(2.0, 4.0))
    x = prepare(torch.ones(1, 2, 2, 8, 8), _view((0, 0, 8, 8, 0)), spec, (8, 8))
    assert torch.equal(x[0, 0], torch.zeros(2, 8, 8))
    assert torch.equal(x[0, 1], torch.full((2, 8, 8), 0.75))
