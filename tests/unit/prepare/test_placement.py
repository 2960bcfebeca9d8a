"""Placement of source frames in stored frames: aspect ratios, borders, and the joints that lie on them."""

import numpy as np
import pytest

from mmdistill.prepare.placement import Placement, fit_into, scale_to_height


def test_without_a_size_the_width_follows_the_aspect_ratio() -> None:
    assert scale_to_height((1080, 1920), 224) == Placement((224, 398), (224, 398))
    assert scale_to_height((320, 180), 224).stored == (224, 126)


@pytest.mark.parametrize(
    ("source", "fit", "scaled", "offset"),
    [
        ((240, 320), "pad", (224, 299), (0, 42)),
        ((240, 320), "crop", (288, 384), (-32, 0)),
        ((320, 180), "pad", (224, 126), (0, 129)),
        ((320, 180), "crop", (683, 384), (-230, 0)),
        ((224, 384), "pad", (224, 384), (0, 0)),
    ],
)
def test_any_aspect_ratio_fits(
    source: tuple[int, int], fit: str, scaled: tuple[int, int], offset: tuple[int, int]
) -> None:
    assert fit_into(source, (224, 384), fit) == Placement((224, 384), scaled, offset)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("source", [(60, 80), (80, 45), (50, 50), (36, 64)])
def test_frame_and_joints_have_the_same_place(source: tuple[int, int], fit: str) -> None:
    """A bright square near the image center, and a joint in its center."""
    height, width = source
    pixels = np.full((height, width, 3), 60, np.uint8)
    y, x = height // 2 + 3, width // 2 - 5
    pixels[y - 3 : y + 4, x - 3 : x + 4] = 255
    place = fit_into(source, (72, 128), fit)
    image = place.place(pixels)
    assert image.shape == (72, 128, 3)
    rows, columns = np.nonzero(image[..., 0] > 150)
    joints = place.place_joints(np.array([[x, y, 0.7]]), source)
    np.testing.assert_allclose(joints, [[columns.mean(), rows.mean(), 0.7]], atol=0.6)
    borders = (image.max(axis=2) == 0).mean()
    expected = 1 - np.prod(place.scaled) / (72 * 128) if fit == "pad" else 0.0
    assert borders == pytest.approx(expected, abs=0.02)


def test_joints_outside_the_stored_frame_are_zero() -> None:
    place = fit_into((100, 100), (50, 100), "crop")
    joints = np.array([[50.0, 10.0, 0.9], [50.0, 50.0, 0.9], [3.0, 50.0, 0.0]])
    np.testing.assert_allclose(place.place_joints(joints, (100, 100)), [[0, 0, 0], [50, 25, 0.9], [0, 0, 0]])
