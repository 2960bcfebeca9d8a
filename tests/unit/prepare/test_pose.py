"""Skeletons: on the players in source pixels, mapped to COCO-17, score 0 where no player is found."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.prepare import pose
from mmdistill.prepare.player_tracking import PlayerBoxes, find_players
from mmdistill.prepare.pose import (
    BLAZEPOSE_TO_COCO,
    PoseError,
    copy_skeletons,
    estimate_in_crops,
    load_mediapipe,
    write_skeletons,
)
from tests.unit.prepare.conftest import TwoPlayers


@pytest.fixture(scope="module")
def found(two_players: TwoPlayers) -> PlayerBoxes:
    """The tracked players, which takes seconds."""
    return find_players(two_players.read, split=0.5)


def bright_center_pose(crop: np.ndarray) -> np.ndarray | None:
    """Replaces the pose network: all joints are at the center of the bright pixels."""
    ys, xs = np.nonzero(crop.min(axis=2) > 180)
    if len(xs) == 0:
        return None
    joints = np.empty((17, 3), np.float32)
    joints[:] = (xs.mean() + 0.5) / crop.shape[1], (ys.mean() + 0.5) / crop.shape[0], 0.9
    return joints


def test_skeletons_lie_on_the_players_in_source_pixels(two_players: TwoPlayers, tmp_path: Path) -> None:
    counts = write_skeletons(
        two_players.read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=estimate_in_crops(bright_center_pose)
    )
    frames, first = len(two_players.near), two_players.far_start
    assert (counts.frames, counts.near, counts.far) == (frames, frames, frames - first)
    rows = SkeletonReader(tmp_path, frame_size=(360, 640)).read("v", range(frames))
    for joint in range(17):
        np.testing.assert_allclose(rows[:, 0, joint, :2], two_players.near, atol=2)
        np.testing.assert_allclose(rows[first:, 1, joint, :2], two_players.far[first:], atol=2)
    assert not rows[:first, 1].any()
    assert np.isfinite(rows).all()
    assert counts.camera_moves == 0


def test_contact_sheet_shows_the_skeletons_in_two_colors(
    two_players: TwoPlayers, found: PlayerBoxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pose, "find_players", lambda *_, **__: found)

    def cross(crop: np.ndarray) -> np.ndarray:
        joints = np.full((17, 3), 0.9, np.float32)
        joints[:, 0], joints[:, 1] = np.linspace(0.2, 0.8, 17), np.linspace(0.8, 0.2, 17)
        return joints

    write_skeletons(two_players.read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=estimate_in_crops(cross))
    sheet = cv2.imread(str(tmp_path / "v.jpg")).astype(int)
    assert sheet.shape == (4 * 270, 3 * (480 + 135), 3)
    assert (tmp_path / "v.jpg").stat().st_size < 500_000
    blue, _, red = np.moveaxis(sheet, 2, 0)
    for tile in range(12):
        top, left = 270 * (tile // 3), 615 * (tile % 3)
        frame, far, near = (
            (slice(top, top + 270), slice(left, left + 470)),
            (slice(top + 4, top + 131), slice(left + 484, left + 611)),
            (slice(top + 139, top + 266), slice(left + 484, left + 611)),
        )
        assert (red - blue)[frame].max() > 100, tile  # the near player
        assert (red - blue)[near].max() > 100, tile
        if tile >= 4:  # from frame 10 on
            assert (blue - red)[frame].max() > 100, tile  # the far player
            assert (blue - red)[far].max() > 100, tile


@pytest.mark.parametrize("wrong", ["off center", "not finite"])
def test_pose_of_another_person_is_discarded(
    two_players: TwoPlayers, found: PlayerBoxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Hips far from the crop center belong to another person; NaN never reaches the file."""
    monkeypatch.setattr(pose, "find_players", lambda *_, **__: found)
    joints = np.full((17, 3), 0.95 if wrong == "off center" else np.nan, np.float32)
    counts = write_skeletons(
        two_players.read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=estimate_in_crops(lambda _: joints)
    )
    assert (counts.near, counts.far) == (0, 0)
    assert not SkeletonReader(tmp_path, frame_size=(360, 640)).read("v", range(counts.frames)).any()


def test_blazepose_landmarks_are_mapped_to_coco() -> None:
    """BlazePose: 0 nose, 2/5 eyes, 7/8 ears, 11/12 shoulders, ..., 27/28 ankles; odd is left from 7 on."""
    assert len(BLAZEPOSE_TO_COCO) == 17
    assert BLAZEPOSE_TO_COCO[5:] == tuple(range(11, 17)) + tuple(range(23, 29))
    assert all(landmark % 2 == joint % 2 for joint, landmark in enumerate(BLAZEPOSE_TO_COCO) if joint >= 3)


def test_missing_pose_extra_is_reported_with_the_installation_command() -> None:
    try:
        import mediapipe  # noqa: F401
    except ImportError:
        with pytest.raises(PoseError, match="pip install --no-deps mediapipe"):
            load_mediapipe()


READY = {"keypoint_score": np.full((2, 40, 17), 0.9, np.float32), "total_frames": 40, "img_shape": (180, 320)}


def write_ready(path: Path, players: TwoPlayers, **changes: object) -> Path:
    """A skeleton file of another program, in px of an image of half the size: all joints in the center."""
    path.parent.mkdir(parents=True, exist_ok=True)
    centers = np.stack([players.near, players.far])[:, :, None].repeat(17, axis=2)
    centers = centers + np.linspace(-15, 15, 17)[:, None]
    path.write_bytes(pickle.dumps({"keypoint": (centers + 0.5) / 2 - 0.5, **READY, **changes}))
    return path


def test_ready_skeletons_are_written_and_drawn(two_players: TwoPlayers, tmp_path: Path) -> None:
    source = write_ready(tmp_path / "ready/v.pkl", two_players)
    counts = copy_skeletons(two_players.read, source, tmp_path / "v.pkl", tmp_path / "v.jpg")
    assert (counts.frames, counts.near, counts.far) == (40, 40, 40)
    rows = SkeletonReader(tmp_path, frame_size=(360, 640)).read("v", range(40))
    np.testing.assert_allclose(rows[:, 0, 8, :2], two_players.near, atol=0.01)
    np.testing.assert_allclose(rows[:, 1, 8, :2], two_players.far, atol=0.01)
    np.testing.assert_allclose(rows[..., 2], 0.9)
    assert cv2.imread(str(tmp_path / "v.jpg")).shape == (1080, 1845, 3)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"keypoint": np.ones((2, 39, 17, 2)), "keypoint_score": np.ones((2, 39, 17)), "total_frames": 39},
         "39 rows, but the video has 40 frames"),
        ({"keypoint_score": np.full((2, 40, 17), 7.0)}, "values up to 7"),
        ({"keypoint_score": np.full((2, 40, 17), np.nan)}, "not finite"),
        ({"img_shape": (18, 32)}, "lie outside the image"),
    ],
)  # fmt: skip
def test_ready_skeletons_that_do_not_fit_are_an_error(
    two_players: TwoPlayers, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    source = write_ready(tmp_path / "ready/v.pkl", two_players, **changes)
    with pytest.raises(ValueError, match=expected) as caught:
        copy_skeletons(two_players.read, source, tmp_path / "v.pkl", tmp_path / "v.jpg")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "v.pkl").exists()
