"""Flow to model input and to images."""

import numpy as np
import pytest
import torch

from mmdistill.modalities import ReaderOptions, get_modality, preprocess_clips
from mmdistill.models.preprocessing import subtract_median

FLOW = get_modality("flow").spec()


def test_statistics_are_applied_per_channel() -> None:
    spec = get_modality("flow").spec(mean=(1.0, -2.0), std=(2.0, 4.0))
    x = preprocess_clips(torch.ones(1, 2, 2, 8, 8), torch.tensor([[0.0, 0, 8, 8, 0]]), spec, (8, 8))
    assert torch.equal(x[0, 0], torch.zeros(2, 8, 8))
    assert torch.equal(x[0, 1], torch.full((2, 8, 8), 0.75))


@pytest.mark.parametrize("flip", [0, 1])
def test_resize_scales_displacements_and_flip_negates_x(flip: int) -> None:
    clips = torch.ones(1, 3, 2, 8, 12)
    x = preprocess_clips(clips, torch.tensor([[0.0, 0, 8, 12, flip]]), FLOW, (4, 24))
    assert x.shape == (1, 2, 3, 4, 24)
    torch.testing.assert_close(x[0, 0], torch.full((3, 4, 24), -2.0 if flip else 2.0))
    torch.testing.assert_close(x[0, 1], torch.full((3, 4, 24), 0.5))


def test_median_compensation_removes_the_motion_of_the_background() -> None:
    spec = get_modality("flow").spec(compensate="median")
    flow = torch.zeros(1, 2, 2, 16, 16, dtype=torch.float16)
    flow[0, 0, :, 4:8, 4:8] = 3  # a small object moves by (3, 3) in both frames, the background by (2, -1) in frame 1
    flow[0, 1] = flow[0, 0] + torch.tensor([2.0, -1.0]).view(2, 1, 1)
    x = preprocess_clips(flow, torch.tensor([[0.0, 0, 16, 16, 0]]), spec, (16, 16))
    torch.testing.assert_close(x[0, :, 0], flow[0, 0].float())
    torch.testing.assert_close(x[0, :, 1], flow[0, 0].float())


def test_median_is_that_of_a_regular_grid_of_pixels() -> None:
    flow = torch.randn(2, 3, 2, 60, 90)
    found = subtract_median(flow, max_pixels=15 * 23)  # every fourth pixel along both axes
    grid = flow[..., 2::4, 2::4].numpy()
    expected = flow.numpy() - np.quantile(grid, 0.5, axis=(3, 4), keepdims=True, method="lower")
    np.testing.assert_array_equal(found.numpy(), expected)
    small = flow[..., :5, :5]  # all pixels
    np.testing.assert_array_equal(
        subtract_median(small).numpy(), small.numpy() - np.median(small.numpy(), axis=(3, 4), keepdims=True)
    )


def test_reader_gets_the_options() -> None:
    images = ReaderOptions(frame_size=(4, 6), pattern="{video}/{axis}_{frame}.png", flow_bound=20, flow_axes="uv")
    assert get_modality("flow").open_reader("root", images).files("a", [3]) == ["root/a/u_3.png", "root/a/v_3.png"]
    reader = get_modality("flow").open_reader("root", ReaderOptions(frame_size=(4, 6)))
    assert reader.files("a", [3]) == ["root/a/pair_00003.npy"]
    assert get_modality("flow").is_frame_pair


def test_image_encodes_direction_as_hue_and_magnitude_as_saturation() -> None:
    flow = get_modality("flow")
    values = torch.tensor([[0.0, 1.0, -1.0, 0.5], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 1, 4)
    assert flow.display_max(2 * values) == 2.0
    expected = [[1, 1, 1], [1, 0, 0], [0, 1, 1], [1, 0.5, 0.5]]  # white, red, cyan, light red
    np.testing.assert_allclose(flow.to_image(values)[0, 0], expected, atol=1e-6)
