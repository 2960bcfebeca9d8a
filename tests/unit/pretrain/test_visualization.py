"""Pictures of a reconstruction: the arithmetic of each row, the file, the script."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdistill.config import ConfigError, PretrainConfig, stored_config, to_plain
from mmdistill.config.compose import load_config
from mmdistill.modalities import ModalitySpec, get_modality
from mmdistill.models.targets import patch_targets
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE, masked_indices
from mmdistill.pretrain.visualization import _rows, draw, reconstruct, scatter_patches, to_display_image, write
from tests.commands import Script, run_python
from tests.tiny_data import MODEL, make_tiny, overrides

GRID = (2, 2, 3)


def _spec(name: str, target: str) -> ModalitySpec:
    channels = get_modality(name).spec().channels
    return ModalitySpec(name, channels, 1, (0.3,), (0.5,), target)


def _clip(channels: int) -> torch.Tensor:
    return torch.randn(1, channels, 4, 16, 24, generator=torch.Generator().manual_seed(0))


VISIBLE = torch.tensor([[0, 4, 7]])
REMOVED = masked_indices(VISIBLE, 12)


def test_scatter_is_the_inverse_of_the_targets_order() -> None:
    x = _clip(3)
    every = torch.arange(12)[None]
    values = patch_targets(x, every, GRID, target="pixel")
    assert torch.equal(scatter_patches(values, every, GRID, torch.zeros_like(x)), x)
    part = scatter_patches(values[:, REMOVED[0]] * 0 - 7, REMOVED, GRID, x)
    assert torch.equal(patch_targets(part, VISIBLE, GRID, target="pixel"), values[:, VISIBLE[0]])
    assert (patch_targets(part, REMOVED, GRID, target="pixel") == -7).all()


@pytest.mark.parametrize("kind", ["norm_pix", "centred", "pixel", "motion_energy"])
def test_a_perfect_network_reconstructs_the_input(kind: str) -> None:
    x = _clip(2)
    rows = _rows(x, VISIBLE, REMOVED, patch_targets(x, REMOVED, GRID, target=kind), kind, GRID)
    assert rows["masked"].isnan().float().mean() == pytest.approx(9 / 12)
    if kind == "motion_energy":
        assert torch.allclose(rows["target: motion energy"], rows["prediction of it"])
        return
    with_truth = next(v for k, v in rows.items() if k.startswith("reconstruction"))
    assert torch.allclose(with_truth, x[0], atol=1e-5)
    if kind in ("norm_pix", "centred"):
        assert any("+ true" in k for k in rows)
        blind = next(v for k, v in rows.items() if "visible patches" in k)
        assert not torch.allclose(blind, x[0], atol=1e-2)  # the removed patches' means stay unknown


def test_without_true_statistics_nothing_of_the_removed_patches_is_used() -> None:
    x, prediction = _clip(3), torch.randn(1, 9, 3 * 2 * 64)
    other = scatter_patches(torch.randn(1, 9, 3 * 2 * 64) * 5 + 3, REMOVED, GRID, x)
    title = "reconstruction + mean and std\nof the visible patches"
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
def test_picture_of_each_modality(name: str, target: str, tmp_path: Path) -> None:
    spec = _spec(name, target)
    geometry = EncoderConfig(spec.channels, 4, 16, 24, 8, 2, dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32)
    model = VideoMAE(geometry, DecoderConfig(16, 1, 2, 8, 32)).train()
    found = reconstruct(model, _batch(name), spec)
    assert model.training
    assert found.loss > 0
    image = draw(found, "title")
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert len(np.unique(image)) > 20
    write(image, tmp_path / "new" / "p.png")
    assert (cv2.imread(str(tmp_path / "new" / "p.png"))[..., ::-1] == image).all()


def test_colours_of_known_values() -> None:
    spec = ModalitySpec("flow", 2, 1, (0.0,), (1.0,), "pixel")
    right = torch.zeros(2, 1, 1, 2)
    right[0, 0, 0, 0] = 3.0
    colours = to_display_image(right, spec, is_energy=False, scale=3.0)
    assert colours[0, 0].tolist() == [[1, 0, 0], [1, 1, 1]]  # to the right is red, standing is white
    rgb = ModalitySpec("rgb", 3, 1, (0.5,), (0.5,), "pixel")
    assert to_display_image(torch.full((3, 1, 1, 1), -1.0), rgb, is_energy=False, scale=1.0)[0, 0, 0].tolist() == [
        0,
        0,
        0,
    ]
    assert (
        to_display_image(torch.full((3, 1, 1, 1), float("nan")), rgb, is_energy=False, scale=1.0)[0, 0, 0].tolist()
        == [0.5] * 3
    )


def test_pretraining_draws_and_the_script_draws_its_checkpoint(tmp_path: Path, script: Script) -> None:
    data, run = make_tiny(tmp_path / "data", per_class=2), tmp_path / "run"
    arguments = [*overrides(data), *MODEL, "trainer.image_every_n_epochs=2", f"hydra.run.dir={run}"]
    run_python("pretrain_main.py", "modality=rgb", *arguments)
    assert [p.name for p in (run / "pictures").iterdir()] == ["epoch=01.png"]
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [e.step for e in events.Images("reconstruction")] == [6]  # 24 clips in batches of 8, twice
    checkpoint = next((run / "checkpoints").glob("epoch=01-*"))
    moved = data.rename(tmp_path / "moved")
    given = [checkpoint, f"data_module.target_data_dir={moved}", "--clips", 2, "--split", "val"]
    said = script("visualize_reconstruction.py", *given, "--out", tmp_path / "out").stdout
    assert len(list((tmp_path / "out").glob("clip_*.png"))) == 2
    assert said.count("trivial predictor") == 2


def test_stored_config_is_the_config_and_takes_overrides() -> None:
    config = load_config(PretrainConfig, "config_pretrain", ["modality=flow"])
    assert stored_config(to_plain(config), PretrainConfig) == config
    assert stored_config(to_plain(config), PretrainConfig, ["data_module.mask_ratio=0.9"]).data_module.mask_ratio == 0.9
    with pytest.raises(ConfigError, match="mask_rtio"):
        stored_config(to_plain(config), PretrainConfig, ["data_module.mask_rtio=0.9"])
