"""Standardized targets, against NumPy on all clips at once."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mmdistill.distill.standardization import TargetStandardizer, make_standardizers, phi_s_rotation

METHODS = ["standard", "phi_s"]
WIDTH = 8


def _features(num_clips: int = 50, width: int = WIDTH) -> Tensor:
    """Correlated dimensions of different means and variances, float32 (clips, width)."""
    rng = np.random.default_rng(3)
    mixed = rng.normal(size=(num_clips, width)) @ rng.normal(size=(width, width))
    return torch.tensor(mixed * np.geomspace(1e-3, 10, width) + np.linspace(-5, 5, width), dtype=torch.float32)


def _fitted(method: str, features: Tensor, sizes: tuple[int, ...] = (7, 1, 42)) -> TargetStandardizer:
    standardizer = TargetStandardizer(features.shape[1], method)
    for batch in features.split(sizes):
        standardizer.update(batch)
    standardizer.finish()
    return standardizer


def test_standard_is_the_score_of_each_dimension() -> None:
    x = _features().double().numpy()
    found = _fitted("standard", _features())(_features())
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), (x - x.mean(axis=0)) / x.std(axis=0), rtol=1e-5, atol=1e-6)


def test_phi_s_gives_every_dimension_the_same_variance_and_keeps_all_angles() -> None:
    x = _features().double().numpy()
    standardizer = _fitted("phi_s", _features())
    found = standardizer(_features()).double().numpy()
    centered, scale = x - x.mean(axis=0), np.sqrt(x.var(axis=0).mean())
    np.testing.assert_allclose(found.var(axis=0), np.ones(WIDTH), rtol=1e-5)
    np.testing.assert_allclose(found @ found.T, centered @ centered.T / scale**2, rtol=1e-4, atol=1e-5)
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    rotated = standardizer.rotation.numpy() @ vectors  # the Hadamard matrix, up to the signs of the eigenvectors
    np.testing.assert_allclose(np.abs(rotated), np.full((WIDTH, WIDTH), WIDTH**-0.5), rtol=1e-6)
    assert values.max() > 100 * values.min()


def test_phi_s_is_not_rotated_before_the_end_of_the_first_epoch() -> None:
    standardizer, x = TargetStandardizer(WIDTH, "phi_s"), _features().double().numpy()
    standardizer.update(_features())
    expected = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0).mean())
    np.testing.assert_allclose(standardizer(_features()).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_statistics_do_not_depend_on_the_batches(method: str) -> None:
    one, many = _fitted(method, _features(), (50,)), _fitted(method, _features(), (1, 1, 20, 28))
    for name, value in one.state_dict().items():
        tolerance = 1e-6 if name == "rotation" else 1e-12  # eigenvectors of similar eigenvalues depend on rounding
        torch.testing.assert_close(value, many.state_dict()[name], rtol=tolerance, atol=tolerance)
    variance = _features().double().numpy().var(axis=0)
    np.testing.assert_allclose(many.variance.numpy(), variance, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [2.0**10, 2.0**-20])
def test_a_power_of_two_changes_no_bit(method: str, factor: float) -> None:
    scaled = _fitted(method, _features() * factor)(_features() * factor)
    assert torch.equal(scaled, _fitted(method, _features())(_features()))


def test_constant_dimension_gives_zero() -> None:
    features = _features()
    features[:, 2], features[:, 5] = 0.3, 0.0
    features[::2, 2] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))  # rounding of the teacher
    found = _fitted("standard", features)(features)
    assert torch.equal(found[:, [2, 5]], torch.zeros(50, 2))
    assert bool((found[:, [0, 1, 3, 4, 6, 7]].std(dim=0) > 0.9).all())


@pytest.mark.parametrize("method", METHODS)
def test_constant_teacher_and_first_clip_give_zero(method: str) -> None:
    constant = torch.full((4, WIDTH), 0.7)
    assert torch.equal(_fitted(method, constant, (2, 2))(constant), torch.zeros(4, WIDTH))
    one_clip = TargetStandardizer(WIDTH, method)
    assert torch.equal(one_clip(constant), torch.zeros(4, WIDTH))
    one_clip.update(_features(1))
    assert torch.equal(one_clip(_features(1)), torch.zeros(1, WIDTH))


@pytest.mark.parametrize("method", METHODS)
def test_features_that_are_not_finite_are_ignored(method: str) -> None:
    standardizer = _fitted(method, _features())
    before = {name: value.clone() for name, value in standardizer.state_dict().items()}
    for value in (float("nan"), float("inf")):
        features = _features(3)
        features[1, 1] = value
        standardizer.update(features)
    assert all(torch.equal(value, standardizer.state_dict()[name]) for name, value in before.items())


def test_rotation_of_a_singular_covariance_is_orthogonal() -> None:
    features = _features(3).double()
    centered = features - features.mean(dim=0)
    rotation = phi_s_rotation(centered.T @ centered)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(WIDTH, dtype=torch.float64))


def test_method_and_width_decide_the_buffers() -> None:
    assert not make_standardizers({"rgb": 8}, None)
    assert set(make_standardizers({"rgb": 8}, "standard").state_dict()) == {"rgb.count", "rgb.mean", "rgb.scatter"}
    assert make_standardizers({"rgb": 8}, "phi_s").state_dict()["rgb.scatter"].shape == (8, 8)
    with pytest.raises(ValueError, match="of the width 100 of teacher flow, and none is known here; use standard"):
        make_standardizers({"rgb": 8, "flow": 100}, "phi_s")
