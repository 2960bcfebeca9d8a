"""The command ``compute-stats``: a dataset config with the statistics of the model input."""

import argparse
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from mmdistill.cli.compute_stats import dataset_keys, main, next_steps
from mmdistill.config import PretrainConfig
from mmdistill.config.compose import CONFIGS, load_config
from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.readers.flow_file import write_flow

SIZE, FRAMES = (32, 48), 18


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One rally in the tennis layout with random frames and flow of mean 1 and std 3."""
    rng = np.random.default_rng(0)
    (tmp_path / "vid_frames_224/a").mkdir(parents=True)
    (tmp_path / "tennis_flows/a").mkdir(parents=True)
    for k in range(FRAMES):
        cv2.imwrite(str(tmp_path / f"vid_frames_224/a/{k:06d}.jpg"), rng.integers(0, 255, (*SIZE, 3), np.uint8))
        write_flow(tmp_path / f"tennis_flows/a/pair_{k:05d}.npy", rng.normal(1, 3, (2, *SIZE)).astype(np.float32))
    (tmp_path / "unlabel.json").write_text(json.dumps(to_json([Rally("a", FRAMES, 25.0, ())])))
    return tmp_path


def write_skeletons(root: Path, missing: list[int]) -> None:
    scores = np.ones((2, FRAMES, 17))
    scores[:, :, missing] = 0
    keypoints = np.random.default_rng(0).uniform(8, 24, (2, FRAMES, 17, 2))
    entry = {"keypoint": keypoints, "keypoint_score": scores, "total_frames": FRAMES, "img_shape": SIZE}
    (root / "skeletons").mkdir()
    (root / "skeletons/a.pkl").write_bytes(pickle.dumps(entry))


def compute(root: Path, *options: object) -> int:
    overrides = [
        f"data_module.target_data_dir={root}",
        "data_module.skeleton_dir=skeletons",
        f"data_module.frame_size={list(SIZE)}",
        "data_module.crop_size=[32,32]",
        "data_module.num_frames=4",
        "data_module.mask_ratio=0.5",
        "num_workers=0",
    ]
    return main(["--config-name", "config_pretrain_tennis", *map(str, options), *overrides])


def test_config_contains_the_statistics(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_skeletons(root, missing=[0])
    out = root / "new" / "mine.yaml"
    assert compute(root, "--clips", 99, "--output", out) == 0
    text = out.read_text()
    assert text.startswith("# @package data_module\n# statistics over 4 clips, by mmdistill compute-stats\n")
    config = yaml.safe_load(text)
    assert config["name"] == "mine"
    assert not {"mask_ratio", "window_stride"} & set(config)
    assert 0.4 < config["modalities"]["rgb"]["mean"][0] < 0.6
    assert config["modalities"]["flow"]["mean"] == pytest.approx([1, 1], abs=0.2)
    assert config["modalities"]["flow"]["std"] == pytest.approx([3, 3], abs=0.2)
    assert len(config["modalities"]["skeleton"]["std"]) == 17
    assert compute(root, "--output", out) == 2
    assert f"{out}: exists; choose another name, or use --force to replace it" in capsys.readouterr().err
    assert out.read_text() == text
    assert compute(root, "--clips", 99, "--output", out, "--force") == 0
    message = "skeleton: joints [0] were not found in the training set; their std is set to 1"
    shown = capsys.readouterr().err
    assert message in shown.replace("\n", " ")
    assert f"wrote {out}; to use it, move it to DIR/dataset/ and add --config-dir=DIR dataset=mine\n" in shown


def test_training_set_without_skeletons_is_reported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_skeletons(root, missing=list(range(17)))
    assert compute(root, "--modalities", "skeleton", "--clips", 1) == 0
    done = capsys.readouterr()
    assert "no skeleton was found in the training set; the std of all channels is set to 1" in done.err
    modalities = yaml.safe_load(done.out)["modalities"]
    assert modalities["skeleton"]["std"] == [1.0] * 17
    assert list(modalities) == ["rgb", "skeleton"]


def test_constant_image_channels_are_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (root / "tennis_flows/a").iterdir():
        write_flow(path, np.ones((2, *SIZE), np.float32))
    assert compute(root, "--modalities", "flow", "--clips", 1) == 0
    assert "flow: channels [0, 1] have the same value everywhere; their std is set to 1" in capsys.readouterr().err


def test_missing_data_exits_with_2(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compute(root) == 2
    assert "skeleton" in capsys.readouterr().err


def test_next_command_selects_the_written_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a source tree the config is in its ``configs/``; elsewhere `--config-dir` is needed."""
    overrides = ["data_module.target_data_dir=d", "data_module.window_stride=8", "num_workers=0"]
    options = argparse.Namespace(
        output=tmp_path / "dataset/mine.yaml", config_name="config_pretrain_tennis", overrides=overrides
    )
    command = "to pretrain: mmdistill pretrain -m --config-name=config_pretrain_tennis"
    keys = "dataset=mine modality=rgb,flow data_module.window_stride=8"
    assert next_steps(options, ["rgb", "flow"]) == [
        f"wrote {options.output}",
        f"{command} --config-dir={tmp_path} {keys}",
    ]
    assert next_steps(options, ["rgb"], 7)[1].endswith(" modality=rgb data_module.window_stride=8 batch_size=7")
    monkeypatch.chdir(CONFIGS.parent)
    options.output = Path("configs/dataset/mine.yaml")
    assert next_steps(options, ["rgb", "flow"]) == [f"wrote {options.output}", f"{command} {keys}"]


def test_next_command_has_a_batch_size_that_fits_the_clips(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = root / "dataset/mine.yaml"
    assert compute(root, "--modalities", "rgb", "flow", "--output", out) == 0
    assert capsys.readouterr().err.rstrip().endswith("modality=rgb,flow data_module.mask_ratio=0.5 batch_size=4")


def test_next_command_names_the_computed_modalities_only(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compute(root, "--clips", 1, "--modalities", "flow", "--output", root / "dataset/mine.yaml") == 0
    assert " modality=flow " in capsys.readouterr().err


def test_training_keys_are_those_of_the_datasets_own_config() -> None:
    overrides = ["modality=rgb", "data_module.window_stride=8", "data_module.mask_ratio=0.9"]
    data = load_config(PretrainConfig, "config_pretrain", overrides).data_module
    written = dataset_keys(data, ["flow"], overrides, None)
    assert (written["window_stride"], written["mask_ratio"]) == (1, 0.5)
    assert list(written["modalities"]) == ["rgb", "flow"]


def test_config_never_has_the_name_of_another_dataset(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("demo", "epic"):
        assert compute(root, "--clips", 1, "--output", root / f"dataset/{name}.yaml") == 2
        assert f"dataset={name} selects {CONFIGS}/dataset/{name}.yaml; choose another" in capsys.readouterr().err
    assert not (root / "dataset").exists()
    path = CONFIGS / "dataset/demo.yaml"
    before = path.read_text()
    assert compute(root, "--clips", 1, "--output", path, "--force") == 2
    assert "the name demo belongs to the generated data" in capsys.readouterr().err
    assert path.read_text() == before
    out = root / "mine.yaml"
    assert compute(root, "--clips", 1, "--output", out, "data_module.name=given", "--modalities", "rgb") == 0
    assert yaml.safe_load(out.read_text())["name"] == "given"
