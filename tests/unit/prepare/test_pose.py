"""Skeletons: on the players in source pixels, mapped to COCO-17, score 0 where no player is found."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.prepare import pose
from mmdistill.prepare.player_tracking import PlayerBoxes, find_players
from mmdistill.prepare.pose import BLAZEPOSE_TO_COCO, PoseError, load_mediapipe_pose, write_skeletons
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
        two_players.read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=bright_center_pose
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

    write_skeletons(two_players.read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=cross)
    sheet = cv2.imread(str(tmp_path / "v.jpg")).astype(int)
    assert sheet.shape == (4 * 270, 3 * 480, 3)
    blue, _, red = np.moveaxis(sheet, 2, 0)
    for tile in range(12):
        part = (slice(270 * (tile // 3), 270 * (tile // 3 + 1)), slice(480 * (tile % 3), 480 * (tile % 3 + 1)))
        assert (red - blue)[part].max() > 100, tile  # the near player
        if tile >= 4:  # from frame 10 on
            assert (blue - red)[part].max() > 100, tile


def test_frame_number_is_visible_on_white_and_on_black() -> None:
    for level in (0, 255):
        image = np.full((270, 480, 3), level, np.uint8)
        tile = pose._draw_skeletons(image, np.zeros((2, 17, 3), np.float32), "frame 7")
        assert np.abs(tile.astype(int) - level).max() > 200
        assert {tile.min() < 60, tile.max() > 200} == {True}


@pytest.mark.parametrize("wrong", ["off center", "not finite"])
def test_pose_of_another_person_is_discarded(
    two_players: TwoPlayers, found: PlayerBoxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """Hips far from the crop center belong to another person; NaN never reaches the file."""
    monkeypatch.setattr(pose, "find_players", lambda *_, **__: found)
    joints = np.full((17, 3), 0.95 if wrong == "off center" else np.nan, np.float32)
    counts = write_skeletons(two_players.read, tmp_path / "v.pkl", tmp_path / "v.jpg", split=0.5, pose=lambda _: joints)
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
            load_mediapipe_pose()
