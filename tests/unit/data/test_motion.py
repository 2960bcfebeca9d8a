"""Motion energies and the weights of tokens, against written-out formulas."""

import numpy as np
import pytest

from mmdistill.data.motion import flow_magnitude, frame_difference, joint_displacement, token_weights

RNG = np.random.default_rng(0)


def test_frame_difference_is_the_mean_over_channels() -> None:
    clip = RNG.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    signed = clip.astype(np.float64)
    first, second = (np.abs(signed[k + 1] - signed[k]).mean(axis=2) for k in (0, 1))
    energy = frame_difference(clip)
    assert energy.dtype == np.float32
    np.testing.assert_allclose(energy, [first, second, second], rtol=1e-5)
    assert not frame_difference(clip[:1]).any()


def test_flow_magnitude_is_the_length() -> None:
    flow = RNG.normal(size=(2, 2, 4, 6)).astype(np.float16)
    x, y = flow[:, 0].astype(np.float64), flow[:, 1].astype(np.float64)
    np.testing.assert_allclose(flow_magnitude(flow), np.sqrt(x * x + y * y), rtol=1e-3)


def test_joints_that_move_count_at_their_pixel() -> None:
    rows = np.zeros((3, 1, 4, 3), np.float32)
    rows[:, 0, 0] = [(2.4, 1, 0.5), (5.4, 5, 0.5), (5.4, 5, 0.5)]  # 5 px, then no motion
    rows[:, 0, 1] = [(2, 1, 0.5), (2, 3, 0.5), (2, 3, 0)]  # 2 px, then absent
    rows[:, 0, 2] = [(np.nan, 1, 1), (4, 4, 1), (4, 6, 1)]  # absent, then 2 px
    rows[:, 0, 3] = [(-3, 1, 1), (3, 9, 1), (4, 4, 1)]  # outside
    expected = np.zeros((3, 8, 7))
    expected[0, 1, 2] = 5 + 2
    expected[1:, 4, 4] = 2  # the last frame has the energy of the one before
    np.testing.assert_allclose(joint_displacement(rows, (8, 7)), expected, rtol=1e-6)
    assert not joint_displacement(rows[:1], (8, 7)).any()


@pytest.mark.parametrize("flip", [0, 1])
def test_token_weights_are_relative_means_over_patches_of_the_crop(flip: int) -> None:
    energy = RNG.random((4, 12, 20)).astype(np.float32)
    grid, crop_box = (2, 2, 3), np.array([3, 2, 8, 12, flip], np.float32)
    crop = energy[:, 3:11, 2:14]
    crop = crop[:, :, ::-1] if flip else crop
    means = [
        crop[2 * t : 2 * t + 2, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean()
        for t in range(2)
        for y in range(2)
        for x in range(3)
    ]
    weights = token_weights(energy, crop_box, grid)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, np.array(means) / np.mean(means) + 0.01, rtol=1e-5)
    np.testing.assert_allclose(token_weights(1000 * energy, crop_box, grid), weights, rtol=1e-5)


def test_squashed_frames_and_patches_of_fractional_size_are_weighted_by_area() -> None:
    """A patch of 1.5 x 2.5 px: pixels at its border count by the part that lies inside."""
    energy = RNG.random((2, 3, 5)).astype(np.float32)
    fine = energy.repeat(2, axis=1).repeat(2, axis=2).mean(axis=0)  # (6, 10): patches of 3 x 5
    means = np.array([fine[3 * y : 3 * y + 3, 5 * x : 5 * x + 5].mean() for y in range(2) for x in range(2)])
    weights = token_weights(energy, np.array([0, 0, 3, 5, 0], np.float32), (1, 2, 2))
    np.testing.assert_allclose(weights, means / means.mean() + 0.01, rtol=1e-5)


def test_a_clip_without_motion_has_equal_weights() -> None:
    assert token_weights(np.zeros((2, 8, 8), np.float32), np.array([0, 0, 8, 8, 0.0]), (1, 2, 2)).tolist() == [1] * 4
