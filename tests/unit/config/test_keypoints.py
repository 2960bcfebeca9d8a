"""Keys of keypoint modalities: layouts, stored heat-maps, extra keypoints, and invalid values."""

from dataclasses import replace
from typing import Any

import pytest
import yaml

from mmdistill.config import ConfigError, ModalityConfig, extra_format, modality_specs, skeleton_format
from mmdistill.config.compose import load_dataset_settings
from mmdistill.config.keypoints import keypoint_layout
from mmdistill.modalities import COCO17, KEYPOINT_LAYOUTS, MODALITIES, StoredHeatmaps, register_modality
from mmdistill.modalities.skeleton import SkeletonModality
from tests.configs import pretrain_config

S = "data_module.modalities.skeleton."
EXTRA = S + "extra_keypoints="
BALL = f"{EXTRA}{{names: [ball, net_left, net_right], pairs: [[net_left, net_right]], dir: ball}}"
RACKET = f"{S}joints={{names: [tip, left, right], pairs: [[left, right]], limbs: [[tip, left]]}}"


def _data(*overrides: str) -> Any:
    return pretrain_config(*overrides).data_module


def test_default_is_coco17_in_the_order_of_the_files() -> None:
    data = _data()
    spec = modality_specs(data)["skeleton"]
    assert (spec.keypoints, spec.channels, spec.heatmaps, spec.sigma) == (COCO17, 17, None, 2.0)
    assert keypoint_layout(data, "flow") is None
    assert skeleton_format(data) == skeleton_format(_data("data_module.skeleton_joints=coco17"))
    assert skeleton_format(data).joint_positions(17) == tuple(range(17))


def test_layout_is_named_or_written_out() -> None:
    assert modality_specs(_data(f"{S}joints=hand21"))["skeleton"].keypoints == KEYPOINT_LAYOUTS["hand21"]
    data = _data(RACKET)
    spec = modality_specs(data)["skeleton"]
    assert spec.keypoints is not None
    assert (spec.keypoints.names, spec.keypoints.flipped, spec.channels) == (("tip", "left", "right"), (0, 2, 1), 3)
    assert skeleton_format(data).joint_positions(3) == (0, 1, 2)
    assert skeleton_format(_data(RACKET, "data_module.skeleton_joints=[4,0,1]")).joint_positions(9) == (4, 0, 1)


def test_extra_keypoints_and_limbs_are_further_channels() -> None:
    data = _data(BALL, f"{S}limb_channels=true")
    spec = modality_specs(data)["skeleton"]
    assert spec.keypoints is not None
    names = spec.keypoints.channel_names
    assert names[17:20] == ("ball", "net_left", "net_right")
    assert (names[20], len(names), spec.channels) == ("left_shoulder-right_shoulder", 32, 32)
    assert spec.keypoints.flipped[17:] == (17, 19, 18)
    assert skeleton_format(data).num_joints == 17
    extra = extra_format(data, "skeleton")
    assert extra is not None
    assert (extra.num_joints, extra.joints, extra.img_shape) == (3, None, None)
    assert spec.statistics["joints"] == list(names)


def test_stored_heatmaps_have_no_sigma() -> None:
    spec = modality_specs(_data(f"{S}joints=hand21", f"{S}heatmap_size=[56,56]", f"{S}sigma=null"))["skeleton"]
    assert (spec.heatmaps, spec.sigma) == (StoredHeatmaps((56, 56), (64, 68)), None)


@pytest.mark.parametrize("name", ["epic", "meccano", "wear", "ego4d"])
def test_datasets_of_mmcdfsl_have_the_hand_pose(name: str) -> None:
    skeleton = load_dataset_settings(name, None)["modalities"]["skeleton"]
    assert (skeleton["joints"], list(skeleton["heatmap_size"]), skeleton["input_stride"]) == ("hand21", [56, 56], 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([S + "joints=hand"], "skeleton.joints=hand is not one of coco17, hand21, or a mapping with a list of names"),
        ([S + "joints={names: abc}"], "is not one of coco17, hand21, or a mapping"),
        ([S + "joints={names: []}"], "is not one of coco17, hand21, or a mapping"),
        ([S + "joints={names: [a, b], lims: [[a, b]]}"], "is not one of coco17"),
        ([S + "joints={names: [a, b], pairs: [1]}"], "is not one of coco17"),
        ([S + "joints={names: [a, [b]]}"], "is not one of coco17"),
        ([S + "joints={names: [a, b], pairs: [[a, c]]}"], "skeleton.joints: the pair [a, c] is not two of the keypoi"),
        (["data_module.modalities.flow.joints=hand21"], "modalities.flow.joints: this modality has no keypoints; remo"),
        (["data_module.modalities.rgb.heatmap_size=[4,4]"], "rgb.heatmap_size: this modality has no keypoints"),
        ([S + "heatmap_size=[56]", S + "sigma=null"], "skeleton.heatmap_size=[56] must be [height, width] in px"),
        ([S + "heatmap_size=[0,4]", S + "sigma=null"], "heatmap_size=0 must be at least 1"),
        ([S + "heatmap_size=[4,4]"], "skeleton.sigma needs keypoint files, but"),
        ([S + "heatmap_size=[4,4]", S + "sigma=null", BALL], "extra_keypoints.names needs keypoint files, but"),
        ([S + "heatmap_size=[4,4]", S + "sigma=null", S + "limb_channels=true"], "limb_channels needs keypoint files"),
        (
            [S + "heatmap_size=[4,4]", S + "sigma=null", "data_module.skeleton_img_shape=[4,4]"],
            "skeleton_img_shape is for keypoint files, but",
        ),
        (
            [S + "heatmap_size=[4,4]", S + "sigma=null", S + "pattern='{video}.npy'"],
            "pattern='{video}.npy' must contain {video} and {frame}",
        ),
        (
            [S + "pattern='{video}/{frame}.npy'"],
            "skeleton.pattern='{video}/{frame}.npy' has {frame}, but there is one keypoint file per video",
        ),
        ([S + "joints={names: [a, b]}", S + "limb_channels=true"], "skeleton: limb_channels: the joints have no limbs"),
        (
            [RACKET, "data_module.skeleton_joints=openpose25"],
            "skeleton_joints=openpose25 is for the joints coco17, and",
        ),
        ([RACKET, "data_module.skeleton_joints=[0,1]"], "skeleton_joints=[0, 1] is not a list of 3 positions from 0"),
        ([EXTRA + "{names: [nose], dir: a}"], "modalities.skeleton: the keypoint nose occurs twice"),
        ([EXTRA + "{names: [], dir: a}"], "extra_keypoints: names=[] and dir=a; set both, or none for no extra"),
        ([EXTRA + "{names: [a], dir: a, pairs: [[a]]}"], "modalities.skeleton: the pair [a] is not two"),
        (
            [EXTRA + "{names: [a], dir: a, pattern: ball.npy}"],
            "extra_keypoints.pattern='ball.npy' must contain {video}",
        ),
        ([EXTRA + "{names: [a], dir: a, img_shape: [4]}"], "extra_keypoints.img_shape=[4] must be [height, width]"),
        ([EXTRA + "{names: [a], dir: a, score_max: 0}"], "extra_keypoints.score_max=0.0 must be at least 1"),
        ([EXTRA + "{names: [a], folder: a}"], "unknown key data_module.modalities.skeleton.extra_keypoints.folder"),
        ([EXTRA + "{names: [a]}"], "extra_keypoints: names=['a'] and dir=None; set both"),
        (["data_module.modalities.flow.extra_keypoints.names=[a]"], "flow.extra_keypoints.names: this modality has no"),
    ],
)
def test_invalid_value_names_its_key(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _data(*given)
    assert message in str(caught.value)


def test_second_keypoint_modality_has_its_own_layout() -> None:
    """It is registered by another package. `skeleton_joints` applies to `skeleton` only."""
    register_modality(SkeletonModality("hand", KEYPOINT_LAYOUTS["hand21"]))
    try:
        files = ModalityConfig(dir="hands", input_stride=2, mean=[0.0], std=[1.0], target="pixel")
        data = _data("data_module.skeleton_joints=openpose25")
        data = replace(data, modalities={**data.modalities, "hand": files})
        assert modality_specs(data)["hand"].channels == 21
        assert skeleton_format(data, "hand").joint_positions(21) == tuple(range(21))
        assert skeleton_format(data).joint_positions(25)[1] == 16
    finally:
        MODALITIES.unregister("hand")


def test_layout_in_a_yaml_file_is_read_as_written() -> None:
    text = "{names: [a, left, right], pairs: [[left, right]]}"
    data = _data(f"{S}joints={text}")
    assert data.modalities["skeleton"].joints == yaml.safe_load(text)
