"""Reconstruction images: the arithmetic of each row, colors, the file."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmdistill.modalities import ModalitySpec, get_modality
from mmdistill.models.targets import patch_targets
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE, masked_indices
from mmdistill.pretrain.visualization import (
    ENERGY_PREDICTION,
    ENERGY_TARGET,
    INPUT,
    MASKED_INPUT,
    PREDICTION,
    PREDICTION_TRUE_STATISTICS,
    PREDICTION_VISIBLE_STATISTICS,
    Reconstruction,
    _rows,
    draw,
    reconstruct,
    scatter_patches,
    write_png,
)

GRID = (2, 2, 3)


def _spec(name: str, target: str) -> ModalitySpec:
    return get_modality(name).spec(input_stride=1, mean=(0.3,), std=(0.5,), target=target)


def _clip(channels: int) -> torch.Tensor:
    return torch.randn(1, channels, 4, 16, 24, generator=torch.Generator().manual_seed(0))


VISIBLE = torch.tensor([[0, 4, 7]])
REMOVED = masked_indices(VISIBLE, 12)


def test_scatter_patches_inverts_patch_targets() -> None:
    x = _clip(3)
    all_tokens = torch.arange(12)[None]
    values = patch_targets(x, all_tokens, GRID, target="pixel")
    assert torch.equal(scatter_patches(values, all_tokens, GRID, torch.zeros_like(x)), x)
    part = scatter_patches(values[:, REMOVED[0]] * 0 - 7, REMOVED, GRID, x)
    assert torch.equal(patch_targets(part, VISIBLE, GRID, target="pixel"), values[:, VISIBLE[0]])
    assert (patch_targets(part, REMOVED, GRID, target="pixel") == -7).all()


@pytest.mark.parametrize("kind", ["norm_pix", "pixel", "motion_energy"])
def test_perfect_prediction_reconstructs_the_input(kind: str) -> None:
    x = _clip(2)
    rows = _rows(x, VISIBLE, REMOVED, patch_targets(x, REMOVED, GRID, target=kind), kind, GRID)
    assert rows[MASKED_INPUT].isnan().float().mean() == pytest.approx(9 / 12)
    if kind == "motion_energy":
        assert torch.allclose(rows[ENERGY_TARGET], rows[ENERGY_PREDICTION])
        return
    assert torch.allclose(rows[PREDICTION_TRUE_STATISTICS if kind == "norm_pix" else PREDICTION], x[0], atol=1e-5)
    if kind == "norm_pix":  # the means of the removed patches are unknown
        assert not torch.allclose(rows[PREDICTION_VISIBLE_STATISTICS], x[0], atol=1e-2)


@pytest.mark.parametrize("kind", ["norm_pix", "pixel", "motion_energy"])
def test_visible_patches_of_a_prediction_are_those_that_its_title_names(kind: str) -> None:
    x = _clip(2)
    prediction = patch_targets(x, REMOVED, GRID, target=kind) + 7
    rows = _rows(x, VISIBLE, REMOVED, prediction, kind, GRID)
    for title, row in rows.items():
        if title.startswith("prediction"):
            shown = rows[ENERGY_TARGET if title.endswith("(visible patches: target)") else INPUT]
            assert title.endswith(("(visible patches: target)", "(visible patches: input)"))
            is_shown = ~rows[MASKED_INPUT].isnan()
            assert torch.equal(row[is_shown], shown[is_shown])
            assert not torch.allclose(row[~is_shown], shown[~is_shown])


def test_visible_statistics_do_not_depend_on_removed_patches() -> None:
    x, prediction = _clip(3), torch.randn(1, 9, 3 * 2 * 64)
    other = scatter_patches(torch.randn(1, 9, 3 * 2 * 64) * 5 + 3, REMOVED, GRID, x)
    title = PREDICTION_VISIBLE_STATISTICS
    a, b = (_rows(c, VISIBLE, REMOVED, prediction, "norm_pix", GRID)[title] for c in (x, other))
    assert torch.allclose(a, b, atol=1e-5)


def _batch(name: str) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    clip = {
        "rgb": torch.randint(0, 256, (1, 4, 16, 24, 3), dtype=torch.uint8, generator=g),
        "flow": torch.randn(1, 4, 2, 16, 24, generator=g).half(),
        "skeleton": torch.rand(1, 4, 2, 17, 3, generator=g) * 16,
    }[name]
    return {name: clip, "visible": VISIBLE, "crop_box": torch.tensor([[0.0, 0, 16, 24, 0]])}


@pytest.mark.parametrize("name", ["rgb", "flow", "skeleton"])
@pytest.mark.parametrize("target", ["norm_pix", "motion_energy", "pixel"])
def test_image_of_each_modality(name: str, target: str, tmp_path: Path) -> None:
    spec = _spec(name, target)
    encoder_config = EncoderConfig(spec.channels, 4, 16, 24, 8, 2, dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32)
    model = VideoMAE(encoder_config, DecoderConfig(16, 1, 2, 8, 32)).train()
    reconstruction = reconstruct(model, _batch(name), spec)
    assert model.training
    assert reconstruction.loss > 0
    image = draw(reconstruction, "title")
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert len(np.unique(image)) > 20
    write_png(image, tmp_path / "new" / "p.png")
    assert (cv2.imread(str(tmp_path / "new" / "p.png"))[..., ::-1] == image).all()


@pytest.mark.parametrize(("height", "width"), [(224, 384), (16, 24)])
def test_a_frame_of_the_image_has_at_least_its_own_size(height: int, width: int) -> None:
    """The frame is white on a white page, with one black frame line; its removed part is gray."""
    rows = {INPUT: torch.full((3, 16, height, width), -10.0), MASKED_INPUT: torch.zeros(3, 16, height, width)}
    image = draw(Reconstruction(_spec("rgb", "pixel"), rows, loss=0.5, constant_baseline=1.0), "title")
    black = (image == 0).all(axis=2)
    frame_rows = black[black.sum(axis=1) > 6 * 140]  # lines of pixels of the first row of frames
    assert len(frame_rows) >= height
    assert frame_rows.sum(axis=1).min() >= 6 * max(width, 140)


def test_title_of_a_constant_clip_has_no_ratio() -> None:
    """The constant baseline of a clip with constant targets is 0."""
    spec = _spec("rgb", "pixel")
    image = draw(Reconstruction(spec, {"input": torch.zeros(3, 4, 16, 24)}, loss=0.5, constant_baseline=0.0), "title")
    assert image.shape[2] == 3
