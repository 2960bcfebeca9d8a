"""Images of the demo dataset: camera, drawing, camera shake and flow against values written out by hand."""

import cv2
import numpy as np
import pytest

from mmdistill.demo import render
from mmdistill.demo.scene import DemoParameters, RallyPlan, RallyScene

Scene = tuple[RallyPlan, DemoParameters, RallyScene]


def test_camera_equals_a_pinhole_computed_by_hand() -> None:
    camera = render.Camera.look_at((0.0, -10.0, 2.0), (0.0, 0.0, 2.0), 100.0, (65, 65))
    uv, depth = camera.project(np.array([[1.0, 0.0, 3.0], [0.0, 10.0, 2.0]]))
    np.testing.assert_allclose(uv, [[32 + 10, 32 - 10], [32, 32]])
    np.testing.assert_allclose(depth, [10, 20])


@pytest.mark.parametrize(("nuisance", "colors"), [(0.0, 1), (1.0, 6)])
def test_courts_differ_only_with_nuisance(nuisance: float, colors: int) -> None:
    parameters = DemoParameters(nuisance=nuisance)
    courts = [render.random_court(parameters.rng("court", k), nuisance) for k in range(6)]
    assert len({court.colors["court"] for court in courts}) == colors


def test_polygon_covers_its_pixels() -> None:
    canvas = render.Canvas.blank((8, 10))
    canvas.fill_polygon(np.array([[1.5, 2.5], [4.5, 2.5], [4.5, 5.5], [1.5, 5.5]]), (255.0, 255.0, 255.0))
    image = canvas.downsample()[..., 0]
    expected = np.zeros((8, 10))
    expected[3:6, 2:5] = 255  # pixel centers are at integers, so pixel 2 extends from 1.5 to 2.5
    assert np.abs(image - expected).max() < 140  # borders are antialiased
    assert (image[3:6, 2:5] == 255).all()
    half = render.Canvas.blank((8, 10))
    half.fill_polygon(np.array([[-1, -1], [10, -1], [10, 8], [-1, 8]]), (200.0, 200.0, 200.0), alpha=0.5)
    assert (half.downsample() == 100).all()


def test_camera_shake_moves_court_and_joints_together() -> None:
    """A bright spot of the supersampled court moves to the transformed pixel coordinate."""
    affine = np.array([[1.02, 0.0, 1.5], [0.0, 1.02, -0.75]])
    canvas = render.Canvas.blank((32, 40))
    canvas.fill_hull(np.array([[20.0, 16.0]]), np.array([1.5]), (255.0, 255.0, 255.0))
    image = render.Canvas(render.warp_court(canvas.image, affine)).downsample()[..., 0].astype(float)
    ys, xs = np.mgrid[:32, :40]
    center = np.array([(xs * image).sum(), (ys * image).sum()]) / image.sum()
    moved = render.apply_affine(affine[None], np.array([[[20.0, 16.0]]]))
    np.testing.assert_allclose(center, moved[0, 0], atol=0.05)


def test_background_moves_by_its_drift() -> None:
    rng = np.random.default_rng(0)
    court = render.add_texture(np.full((256, 272, 3), 120, np.uint8), 0.2, rng, (64, 68))
    assert 0.1 < court.std() / 120 < 0.4
    drift = render.random_drift(60, 8.0, rng)
    assert drift.shape == (60, 2)
    assert (np.abs(drift).max(axis=0) <= [8.0, 2.0]).all()
    assert np.abs(drift[:, 0]).max() > 3
    moved = np.array([[1.0, 0.0, 3.0], [0.0, 1.0, -1.0]])
    images = [render.Canvas(render.warp_court(court, affine)).downsample() for affine in (np.eye(2, 3), moved)]
    flow = render.compute_flow(images[0], images[1])[:, 16:48, 16:48]
    np.testing.assert_allclose(np.median(flow, axis=(1, 2)), [3.0, -1.0], atol=0.1)


def test_background_is_plain_and_still_without_nuisance(plain_scene: Scene) -> None:
    _, _, built = plain_scene
    assert built.appearance.texture == built.appearance.drift == 0
    np.testing.assert_array_equal(built.background, built.affine)


def test_flow_is_the_displacement_of_the_image() -> None:
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 255, (48, 64, 3), np.uint8), (0, 0), 2)
    flow = render.compute_flow(texture, np.roll(texture, (1, 2), axis=(0, 1)))
    assert flow.shape == (2, 48, 64)
    np.testing.assert_allclose(np.median(flow, axis=(1, 2)), [2, 1], atol=0.15)
