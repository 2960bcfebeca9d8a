"""ViTPose: boxes and joints are in the right px of the image, and only complete models are accepted."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.prepare.pipeline import Settings, prepare_all
from mmdistill.prepare.pose import PoseError, write_skeletons
from mmdistill.prepare.vitpose import VitPose, limit_threads
from tests.tiny_pose import write_detector, write_vitpose
from tests.unit.prepare.conftest import TwoPlayers

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
RATIO = 48 / 64  # of the crop of the small ViTPose; its heat-maps have 16 x 12 px


@pytest.fixture(scope="module")
def loaded(pose_models: tuple[str, str]) -> VitPose:
    return VitPose(*pose_models)


@pytest.fixture
def estimator(loaded: VitPose, monkeypatch: pytest.MonkeyPatch) -> VitPose:
    """Its networks may be replaced; the processors are those of transformers."""
    monkeypatch.setattr(loaded, "detector", loaded.detector)
    monkeypatch.setattr(loaded, "pose", loaded.pose)
    return loaded


class FixedPeaks:
    """Replaces ViTPose: joint j has its peak at (x, y) of the heat-map, for every box."""

    config = SimpleNamespace(backbone_config=SimpleNamespace(num_experts=1))

    def __init__(self, peaks: list[tuple[int, int]], height: float = 0.8) -> None:
        self.peaks, self.height = peaks, height

    def __call__(self, pixel_values: Any) -> SimpleNamespace:
        maps = torch.zeros(len(pixel_values), 17, 16, 12)
        for joint, (x, y) in enumerate(self.peaks):
            maps[:, joint, y, x] = self.height
        return SimpleNamespace(heatmaps=maps)


class BrightestPoint:
    """Replaces ViTPose: every joint is at the brightest point of the crop, found in the pixels that it gets."""

    config = FixedPeaks.config

    def __call__(self, pixel_values: Any) -> SimpleNamespace:
        maps = torch.nn.functional.interpolate(pixel_values.mean(1, keepdim=True), (16, 12), mode="area")
        maps = (maps - maps.amin((2, 3), keepdim=True)) / (
            maps.amax((2, 3), keepdim=True) - maps.amin((2, 3), keepdim=True)
        )
        return SimpleNamespace(heatmaps=maps.expand(-1, 17, -1, -1))


def enlarged(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Center and size of the crop of ViTPose: the box in its aspect ratio, 1.25 times as large."""
    left, top, width, height = box
    size = max(width, height * RATIO)
    return left + width / 2, top + height / 2, 1.25 * size, 1.25 * size / RATIO


@pytest.mark.parametrize("box", [(100, 50, 30, 120), (200, 80, 160, 40), (-10, -20, 60, 90), (590, 300, 80, 90)])
def test_peak_of_a_heat_map_is_mapped_to_the_image(estimator: VitPose, box: tuple[float, ...]) -> None:
    """The outermost heat-map pixels lie on the border of the crop, at any position of the box in the image."""
    peaks = [(x, y) for x, y in zip(range(2, 10), range(3, 12), strict=False)] * 3
    estimator.pose = FixedPeaks(peaks[:17])
    (rows,) = estimator.estimate_joints([np.zeros((360, 640, 3), np.uint8)], np.array([box], float))
    x, y, width, height = enlarged(box)
    expected = np.array([(x + (px / 11 - 0.5) * width, y + (py / 15 - 0.5) * height) for px, py in peaks[:17]])
    inside = ((expected >= -0.5) & (expected <= (639.5, 359.5))).all(axis=1)
    np.testing.assert_allclose(rows[inside, :2], expected[inside], atol=1e-3)
    np.testing.assert_allclose(rows[inside, 2], 0.8)
    assert not rows[~inside].any()
    assert inside.all() == (box[0] > 0 and box[0] + box[2] < 640)


@pytest.mark.parametrize("point", [(120, 90), (5, 4), (634, 356), (320, 170)])
def test_joint_lies_on_the_pixels_that_the_network_sees(estimator: VitPose, point: tuple[int, int]) -> None:
    frame = np.zeros((360, 640, 3), np.uint8)
    cv2.circle(frame, point, 4, (255, 255, 255), -1)
    estimator.pose = BrightestPoint()
    box = np.array([[point[0] - 23, point[1] - 41, 60, 90]], float)
    (rows,) = estimator.estimate_joints([frame], box)
    np.testing.assert_allclose(rows[:, :2], np.tile(point, (17, 1)), atol=5)  # a heat-map pixel has 7.5 px
    assert rows[:, 2] == pytest.approx(1)


def test_boxes_and_frames_of_a_batch_are_not_mixed(estimator: VitPose) -> None:
    points = [(100, 100), (300, 200), (500, 90)]
    frames = [np.zeros((360, 640, 3), np.uint8) for _ in points]
    for frame, point in zip(frames, points, strict=True):
        cv2.circle(frame, point, 4, (255, 255, 255), -1)
    estimator.pose = BrightestPoint()
    rows = estimator.estimate_joints(frames, np.array([(x - 20, y - 50, 50, 90) for x, y in points], float))
    np.testing.assert_allclose(rows[:, 0, :2], points, atol=5)


def test_heat_map_without_a_positive_value_has_score_0(estimator: VitPose) -> None:
    estimator.pose = FixedPeaks([(5, 5)] * 17, height=-0.1)
    assert not estimator.estimate_joints([np.zeros((90, 90, 3), np.uint8)], np.array([[20.0, 20, 40, 40]])).any()


class WhiteBoxes:
    """Replaces RT-DETR: each white region of an image is a person; the whole image is a car with a higher score."""

    def __call__(self, pixel_values: Any) -> SimpleNamespace:
        boxes, logits = torch.full((len(pixel_values), 5, 4), 0.5), torch.full((len(pixel_values), 5, 2), -9.0)
        boxes[:, 0], logits[:, 0, 0] = torch.tensor([0.5, 0.5, 1, 1]), 5.0
        for k, image in enumerate(pixel_values):
            bright = (image.mean(0).numpy() > 0.6).astype(np.uint8)
            height, width = bright.shape
            for i, (left, top, w, h, _) in enumerate(cv2.connectedComponentsWithStats(bright)[2][1:5], start=1):
                center = ((left + w / 2) / width, (top + h / 2) / height)
                boxes[k, i], logits[k, i, 1] = torch.tensor([*center, w / width, h / height]), 4.0
        return SimpleNamespace(logits=logits, pred_boxes=boxes)


class Corners:
    """Replaces `estimate_joints`: the joints are the corners and the center of the box."""

    def __call__(self, frames: Any, boxes: np.ndarray) -> np.ndarray:
        (left, top), (width, height) = boxes[:, :2].T, boxes[:, 2:].T
        rows = np.ones((len(boxes), 17, 3), np.float32)
        rows[:, :, 0], rows[:, :, 1] = (left + width / 2)[:, None], (top + height / 2)[:, None]
        rows[:, 0, :2], rows[:, 1, :2] = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
        return rows


def white_boxes(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    frame = np.zeros((360, 640, 3), np.uint8)
    for left, top, width, height in boxes:
        frame[max(top, 0) : top + height, max(left, 0) : left + width] = 255
    return frame


def test_people_are_found_in_px_of_the_image_also_at_its_border(estimator: VitPose) -> None:
    estimator.detector = WhiteBoxes()
    near, far, other = (100, 200, 30, 60), (400, 60, 16, 32), (150, 205, 24, 50)
    frames = [white_boxes(near, far, other), white_boxes(), white_boxes(near, other), white_boxes((0, 310, 30, 50))]
    crops = np.full((2, 4, 3), np.nan)
    crops[0, :3] = (55, 170, 128)  # its center is 4 px from that of the near player
    crops[0, 3] = (-50, 270, 128)  # beyond the left and the lower border
    crops[1, :2] = (376, 44, 64)
    estimator.estimate_joints = Corners()  # type: ignore[method-assign]
    rows = estimator(frames, crops)
    del estimator.estimate_joints
    assert (rows[..., 2] > 0).all(axis=2).tolist() == [[True, False, True, True], [True, False, False, False]]
    np.testing.assert_allclose(rows[0, 0, :2, :2], [(100, 200), (130, 260)], atol=2)  # the detector's input has 2 px
    np.testing.assert_allclose(rows[0, 2, :2, :2], [(100, 200), (130, 260)], atol=2)
    np.testing.assert_allclose(rows[1, 0, :2, :2], [(400, 60), (416, 92)], atol=1)


def test_frames_without_a_crop_cost_no_call(estimator: VitPose) -> None:
    estimator.detector = estimator.pose = None
    assert not estimator([white_boxes()] * 2, np.full((2, 2, 3), np.nan)).any()


@pytest.mark.parametrize("experts", [1, 6])
def test_networks_of_transformers_give_finite_joints_in_the_image(
    pose_models: tuple[str, str], two_players: TwoPlayers, tmp_path: Path, experts: int
) -> None:
    """With random weights the joints have any position; each is finite, in the image and in the crop."""
    pose = VitPose(pose_models[0], str(write_vitpose(tmp_path / "pose", experts=experts)))
    frames = [frame.pixels for frame, _ in zip(two_players.read(), range(3), strict=False)]
    boxes = np.array([(100, 215, 40, 90), (490, 42, 16, 36), (600, 300, 80, 90)], float)
    rows = pose.estimate_joints(frames, boxes)
    assert rows.shape == (3, 17, 3)
    assert np.isfinite(rows).all()
    assert (rows[..., 2] > 0).any(axis=1).all()
    for joints, box in zip(rows, boxes, strict=True):
        x, y, width, height = enlarged(tuple(box))
        found = joints[joints[:, 2] > 0]
        assert (np.abs(found[:, :2] - (x, y)) <= (width / 2 + 1e-3, height / 2 + 1e-3)).all()
        assert (found[:, :2] >= -0.5).all()
        assert (found[:, :2] <= (639.5, 359.5)).all()
        assert (found[:, 2] <= 1).all()


def test_frames_are_given_to_the_networks_in_rgb(estimator: VitPose) -> None:
    blue = np.zeros((90, 90, 3), np.uint8)
    blue[..., 0] = 255  # BGR
    seen = []

    def detector(pixel_values: Any) -> SimpleNamespace:
        seen.append(pixel_values)
        return WhiteBoxes()(pixel_values)

    class Pose(FixedPeaks):
        def __call__(self, pixel_values: Any) -> SimpleNamespace:
            seen.append(pixel_values)
            return super().__call__(pixel_values)

    estimator.detector, estimator.pose = detector, Pose([(5, 5)] * 17)
    estimator([blue], np.array([[[0, 0, 90]], [[np.nan] * 3]], float))
    estimator.estimate_joints([blue], np.array([[20.0, 20, 40, 40]]))
    for pixel_values in seen:
        red, _, blue_channel = pixel_values[0, :, 20:40, 20:40].mean(dim=(1, 2)).tolist()
        assert blue_channel > red + 0.9


@pytest.mark.usefixtures("tracked")
def test_skeletons_of_a_video_lie_on_the_players(estimator: VitPose, two_players: TwoPlayers, tmp_path: Path) -> None:
    """Detection and joints of a whole video, in batches of frames; the last batch is shorter."""
    estimator.detector, estimator.estimate_joints = WhiteBoxes(), Corners()  # type: ignore[method-assign]
    read = itertools.islice(two_players.read(), 35)
    counts = write_skeletons(lambda: read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=estimator)
    del estimator.estimate_joints
    assert (counts.near, counts.far) == (35, 25)
    rows = SkeletonReader(tmp_path, frame_size=(360, 640)).read("v", range(35))
    np.testing.assert_allclose(rows[:, 0, 5, :2], two_players.near[:35], atol=2)
    np.testing.assert_allclose(rows[10:, 1, 5, :2], two_players.far[10:35], atol=2)


def _change_weights(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    if change == "missing":
        del weights["head.conv.weight"]
    elif change == "shape":
        weights["head.conv.bias"] = weights["head.conv.bias"][:3].clone()
    save_file(weights, path, {"format": "pt"})
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif change in ("model.safetensors", "preprocessor_config.json"):
        (folder / change).unlink()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("missing", "weights are missing: head.conv.weight"),
        ("shape", "cannot be loaded"),
        ("truncated", "cannot be loaded"),
        ("model.safetensors", "no file named model.safetensors"),
        ("preprocessor_config.json", "preprocessor_config.json"),
    ],
)
def test_incomplete_folder_is_one_error(
    pose_models: tuple[str, str], tmp_path: Path, change: str, expected: str
) -> None:
    _change_weights(write_vitpose(tmp_path / "pose"), change)
    with pytest.raises(PoseError, match=expected) as caught:
        VitPose(pose_models[0], str(tmp_path / "pose"))
    assert str(caught.value).startswith(f"--pose-model {tmp_path}/pose: ")
    assert "\n" not in str(caught.value)
    assert "online" not in str(caught.value)


def test_model_that_does_not_fit_is_one_error(pose_models: tuple[str, str], tmp_path: Path) -> None:
    detector, pose = pose_models
    with pytest.raises(PoseError, match=r"--detector-model .*: no class is named person \(car, dog\)"):
        VitPose(str(write_detector(tmp_path / "dogs", person="dog")), pose)
    with pytest.raises(PoseError, match=r"--pose-model .*: 133 joints, expected the 17 joints of COCO"):
        VitPose(detector, str(write_vitpose(tmp_path / "wholebody", joints=133)))
    with pytest.raises(PoseError, match=r"--detector-model .*: cannot be loaded"):
        VitPose(pose, detector)


def test_model_that_is_not_downloaded_is_one_error(
    pose_models: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PoseError, match="run the command once while online") as caught:
        VitPose("nobody/no-such-model", pose_models[1])
    assert str(caught.value).startswith("--detector-model nobody/no-such-model: cannot be loaded (")


@pytest.mark.parametrize("name", ["/no/such/dir", "./pose", "~/pose", "models/of/pose"])
def test_path_that_is_no_folder_is_found_before_a_model_is_loaded(name: str) -> None:
    with pytest.raises(PoseError, match=f"^--pose-model {name}: no such folder"):
        VitPose("nobody/no-such-model", name)
    with pytest.raises(PoseError, match=f"^--detector-model {name}: no such folder"):
        VitPose(name, "nobody/no-such-model")


def test_missing_transformers_is_reported_with_the_installation_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_players: TwoPlayers
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    settings = Settings(skeleton="vitpose", pose_model="not loaded before")
    with pytest.raises(PoseError, match=r"pip install 'transformers>=5,<6'"):
        prepare_all({"v": two_players.path}, tmp_path / "out", settings, workers=1, progress=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_processes_divide_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    for num_processes in (1, 3, 20):
        limit_threads(num_processes)
    assert counts == [8, 2, 1]
