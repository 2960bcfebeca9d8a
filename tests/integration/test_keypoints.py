"""Trainings with stored hand pose, and with ball and court corners: from the files to the evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.builders import make_clip_dataset
from mmdistill.checkpoint import load_encoder, read_checkpoint, save_torch
from mmdistill.checkpoint.inspect import inspect_checkpoint
from mmdistill.cli.extract_features import extract_features, parse_arguments
from mmdistill.config import ConfigError, DistillConfig, modality_specs
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.distill import distill
from mmdistill.distill.teachers import read_teacher
from mmdistill.evaluation.networks import load_network
from mmdistill.evaluation.run import evaluate_checkpoint
from mmdistill.modalities import KEYPOINT_LAYOUTS
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.pretrain import pretrain
from tests.configs import distill_config, pretrain_config
from tests.tiny_data import EVAL, FRAMES, HEIGHT, MODEL, WIDTH, make_tiny, overrides, write_teacher

S = "data_module.modalities.skeleton."
CORNERS = ("far_left", "far_right", "near_left", "near_right")
HANDS = [
    "data_module.skeleton_dir=hands",
    f"{S}pattern='{{video}}/{{frame:06d}}.npy'",
    f"{S}joints=hand21",
    f"{S}heatmap_size=[16,18]",
    f"{S}sigma=null",
]
TENNIS = [
    f"{S}extra_keypoints={{names: [ball, {', '.join(CORNERS)}], dir: ball_court, "
    "pairs: [[far_left, far_right], [near_left, near_right]]}",
    f"{S}limb_channels=true",
]
FIXED = ["accelerator=cpu", "precision=32", "trainer.epochs=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data with heat-maps of 21 joints, and with the ball and the corners of the court, in px of the frame."""
    folder = tmp_path_factory.mktemp("keypoints")
    data = make_tiny(folder / "data", per_class=4)
    rng = np.random.default_rng(0)
    corners = [[4.0, 3.0, 1.0], [WIDTH - 5, 3, 1], [1, HEIGHT - 2, 1], [WIDTH - 2, HEIGHT - 2, 1]]
    (data / "ball_court").mkdir()
    for video in sorted(path.stem for path in (data / "skeletons").glob("*.pkl")):
        (data / "hands" / video).mkdir(parents=True)
        points = np.tile(np.array([[16.0, 16.0, 0.8], *corners]), (FRAMES, 1, 1))
        points[:, 0, 0] += np.arange(FRAMES) - 6
        points[3, 0] = 0  # the ball is not found
        np.save(data / "ball_court" / f"{video}.npy", points)
        for k in range(FRAMES):
            np.save(data / "hands" / video / f"{k:06d}.npy", rng.integers(0, 256, (21, 16, 18)).astype(np.uint8))
    return folder


def _distill_config(folder: Path, *changes: str) -> DistillConfig:
    return distill_config(*overrides(folder / "data"), *EVAL, *FIXED, f"feature_cache={folder}/features", *changes)


@pytest.fixture(scope="module")
def teachers(folder: Path) -> dict[str, Path]:
    """A pretrained checkpoint of hand pose and one of skeletons, ball and court; an untrained one of rgb."""
    fixed = [*overrides(folder / "data"), *MODEL, *FIXED, "modality=skeleton"]
    settings = {"hand": HANDS, "tennis": [*TENNIS, "trainer.image_every_n_epochs=0"]}
    found = {name: pretrain(pretrain_config(*fixed, *changes), folder / name) for name, changes in settings.items()}
    return found | {"rgb": write_teacher(folder / "rgb", "rgb", 0)}


def test_hand_pose_is_pretrained_distilled_and_evaluated(folder: Path, teachers: dict[str, Path]) -> None:
    meta = read_checkpoint(teachers["hand"]).meta
    assert meta["statistics"]["skeleton"]["joints"] == list(KEYPOINT_LAYOUTS["hand21"].names)
    assert "sigma" not in meta["statistics"]["skeleton"]
    assert load_encoder(teachers["hand"]).config.channels == 21
    assert inspect_checkpoint(teachers["hand"])["architecture"]["encoder"]["channels"] == 21
    assert list((folder / "hand" / "images").glob("*.png"))
    paths = f"['{teachers['rgb']}','{teachers['hand']}']"
    changes = ["trainer.teachers=[rgb,skeleton]", f"trainer.ckpt_path={paths}", "baselines=[teacher_skeleton]"]
    changes.append("data_module.input_modes=configured")
    config = _distill_config(folder, *HANDS, *changes)
    checkpoint = distill(config, folder / "distill")
    state = read_checkpoint(checkpoint).state_dict
    assert state["teacher_skeleton.encoder.patch_embed.proj.weight"].shape == (32, 21, 2, 4, 4)
    evaluate_checkpoint(config, str(checkpoint), folder / "evaluate")
    scores = json.loads((folder / "evaluate" / "fewshot.json").read_text())
    assert any("teacher_skeleton" in name for name in scores["settings"][0]["rows"])
    assert "heatmap_size" in (folder / "evaluate" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"other keypoints, 21 in place of 17 .* channel 0 .*: wrist / nose; use the"):
        evaluate_checkpoint(_distill_config(folder, *changes), str(checkpoint), folder / "other")


def test_ball_and_court_are_pretrained_and_encoded(folder: Path, teachers: dict[str, Path]) -> None:
    """17 joints, 5 further keypoints and 12 limbs."""
    stored = read_checkpoint(teachers["tennis"]).meta["statistics"]["skeleton"]["joints"]
    assert (stored[16:22], len(stored)) == (["right_ankle", "ball", *CORNERS], 34)
    output = folder / "features.npz"
    config = _distill_config(folder, *TENNIS)
    extract_features(parse_arguments([str(teachers["tennis"]), "--output", str(output)]), config)
    with np.load(output) as features:
        assert features["features"].shape == (16, 1, 32)
    dataset = make_clip_dataset(config.data_module, ("skeleton",), training=False, seed=0)
    assert dataset[0]["skeleton"].shape == (4, 2, 22, 3)


def test_teacher_with_other_keypoints_is_an_error(folder: Path, teachers: dict[str, Path]) -> None:
    swapped = [TENNIS[0].replace("far_left, far_right, near", "far_right, far_left, near"), TENNIS[1]]
    for changes, message in (
        (swapped, r"other keypoints; the first .* channel 18 .*: far_left / far_right; use the same joints"),
        ([TENNIS[0]], r"34 in place of 22 channels; .* channel 22 .*: left_shoulder-right_shoulder / none"),
        ([], r"channel 17 .*: ball / none"),
    ):
        data = _distill_config(folder, *changes).data_module
        with pytest.raises(ConfigError, match=message):
            read_teacher(str(teachers["tennis"]), "skeleton", modality_specs(data)["skeleton"], data)
    data = _distill_config(folder, *TENNIS).data_module
    read_teacher(str(teachers["tennis"]), "skeleton", modality_specs(data)["skeleton"], data)


def test_resume_with_other_keypoints_is_an_error(folder: Path, teachers: dict[str, Path]) -> None:
    fixed = [*overrides(folder / "data"), *MODEL, *FIXED, "modality=skeleton", f"resume='{teachers['tennis']}'"]
    swapped = [TENNIS[0].replace("far_left, far_right, near", "far_right, far_left, near"), TENNIS[1]]
    with pytest.raises(
        ConfigError, match=r"other settings than this run's .* joints \['nose', .*'far_left', 'far_right'"
    ):
        pretrain(pretrain_config(*fixed, *swapped), folder / "resumed")


def test_weights_without_metadata_are_loaded_by_their_channels(folder: Path) -> None:
    """The modality is found by its channels in the dataset. Without names nothing is compared."""
    encoder = Encoder(EncoderConfig(21, 4, 16, 16, 4, 2, dim=128, depth=1, heads=2, head_dim=64, mlp_dim=256))
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    save_torch({"model": state}, folder / "hand.pth")
    data = _distill_config(folder, *HANDS).data_module
    network = load_network(folder / "hand.pth", data=data)
    assert (network.modality, network.encoder.config.channels) == ("skeleton", 21)
    named = json.dumps([f"joint_{k}" for k in range(21)])
    renamed = _distill_config(folder, *(f"{S}joints={{names: {named}}}" if "hand21" in h else h for h in HANDS))
    read_teacher(str(folder / "hand.pth"), "skeleton", modality_specs(renamed.data_module)["skeleton"], data)
    coco = _distill_config(folder).data_module
    with pytest.raises(
        ConfigError, match=r"has 21 input channels, but skeleton has 17; .*skeleton\.joints to its keypoi"
    ):
        read_teacher(str(folder / "hand.pth"), "skeleton", modality_specs(coco)["skeleton"], coco)


def test_cached_features_depend_on_layout_and_extra_keypoints(folder: Path) -> None:
    def key(*changes: str) -> tuple[str, str]:
        data = _distill_config(folder, *changes).data_module
        dataset = make_clip_dataset(data, ("skeleton",), training=False, seed=0)
        return data_fingerprint(dataset, "skeleton"), repr(modality_specs(data)["skeleton"])

    assert key(*TENNIS) == key(*TENNIS)
    without_pairs = [
        TENNIS[0].replace("pairs: [[far_left, far_right], [near_left, near_right]]", "pairs: []"),
        TENNIS[1],
    ]
    with_score = [TENNIS[0].replace("dir: ball", "score_max: 2, dir: ball"), TENNIS[1]]
    keys = [key(*changes) for changes in (TENNIS, [], without_pairs, with_score, HANDS, [TENNIS[0]])]
    assert len(set(keys)) == len(keys)
    before = key(*TENNIS)[0]
    path = next((folder / "data" / "ball_court").iterdir())
    np.save(path, np.load(path)[::-1])
    assert key(*TENNIS)[0] != before


def test_clip_with_a_missing_file_of_extra_keypoints_is_skipped(folder: Path) -> None:
    path = next((folder / "data" / "ball_court").iterdir())
    content = path.read_bytes()
    path.unlink()
    data = _distill_config(folder, *TENNIS, "data_module.on_missing=skip").data_module
    dataset = make_clip_dataset(data, ("rgb", "skeleton"), training=False, seed=0)
    assert dataset.missing_report()["clips_skipped"] == {"skeleton": {path.stem: 1}}
    path.write_bytes(content)
    assert torch.is_tensor(dataset.stats_tensor)
