"""Players and their skeletons: found where they move, mapped to COCO-17, absent where nobody is."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.prepare.player_tracking import crops, find_players
from mmdistill.prepare.pose import BLAZEPOSE_TO_COCO, PoseError, mediapipe_pose, write_skeletons

HEIGHT, WIDTH, FRAMES = 360, 640, 40
REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "tennis-video" / "clip3.mp4"


def near_place(k: int) -> tuple[int, int]:
    return 120 + 6 * k, 260


def far_place(k: int) -> tuple[int, int]:
    return 500 - 4 * k, 60


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tall figure that runs right below, a small one that runs left above; the small one is there from frame 10."""
    path = tmp_path_factory.mktemp("pose") / "v.avi"
    rng = np.random.default_rng(0)
    background = cv2.GaussianBlur(rng.integers(40, 90, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 3)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (WIDTH, HEIGHT))
    for k in range(FRAMES):
        picture = background.copy()
        x, y = near_place(k)
        cv2.rectangle(picture, (x - 20, y - 45), (x + 20, y + 45), (230, 230, 230), -1)
        if k >= 10:
            x, y = far_place(k)
            cv2.rectangle(picture, (x - 8, y - 18), (x + 8, y + 18), (250, 200, 200), -1)
        writer.write(picture)
    writer.release()
    return path


def test_near_and_far_players_are_kept_apart(video: Path) -> None:
    near, far = find_players(video, split=0.5)
    for k in range(FRAMES):
        assert near[k, :2] + near[k, 2:] / 2 == pytest.approx(near_place(k), abs=5)
        if k >= 10:
            assert far[k, :2] + far[k, 2:] / 2 == pytest.approx(far_place(k), abs=5)
        else:
            assert np.isnan(far[k]).all()


def test_nobody_moves_nobody_is_found(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "s.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(12):
        writer.write(np.full((48, 64, 3), 90, np.uint8))
    writer.release()
    boxes = find_players(tmp_path / "s.avi", split=0.5)
    assert boxes.shape == (2, 12, 4)
    assert np.isnan(boxes).all()
    assert np.isnan(crops(boxes[0])).all()


def test_crops_are_square_around_the_player_and_steady() -> None:
    boxes = np.full((20, 4), np.nan)
    boxes[5:] = [100, 50, 20, 40]
    boxes[10] = [90, 40, 200, 60]  # a blob that swallowed a shadow
    got = crops(boxes, margin=2.0)
    assert set(got[:, 2]) == {80}
    np.testing.assert_allclose(got[0], [70, 30, 80])  # before it moved, the player stood where it was first seen


def _bright_pose(crop: np.ndarray) -> np.ndarray | None:
    """A stand-in for the network: all joints in the middle of the bright pixels, one left wrist to the right of it."""
    ys, xs = np.nonzero(crop.min(axis=2) > 180)
    if len(xs) == 0:
        return None
    joints = np.empty((17, 3), np.float32)
    joints[:] = (xs.mean() + 0.5) / crop.shape[1], (ys.mean() + 0.5) / crop.shape[0], 0.9
    return joints


def test_skeletons_lie_on_the_players_in_source_pixels(video: Path, tmp_path: Path) -> None:
    counts = write_skeletons(video, tmp_path / "v.pkl", split=0.5, pose=_bright_pose)
    assert (counts.frames, counts.near, counts.far) == (FRAMES, FRAMES, FRAMES - 10)
    rows = SkeletonReader(tmp_path, frame_size=(HEIGHT, WIDTH)).read("v", range(FRAMES))
    for k in range(FRAMES):
        np.testing.assert_allclose(rows[k, 0, :, :2], np.tile(near_place(k), (17, 1)), atol=2)
        if k >= 10:
            np.testing.assert_allclose(rows[k, 1, :, :2], np.tile(far_place(k), (17, 1)), atol=2)
        else:
            assert not rows[k, 1].any()
    assert np.isfinite(rows).all()


def test_the_map_to_coco_is_by_name() -> None:
    """BlazePose: 0 nose, 2/5 eyes, 7/8 ears, 11/12 shoulders, ..., 27/28 ankles; odd is left from 7 on."""
    assert len(BLAZEPOSE_TO_COCO) == 17
    assert BLAZEPOSE_TO_COCO[5:] == tuple(range(11, 17)) + tuple(range(23, 29))
    assert all(mark % 2 == coco % 2 for coco, mark in enumerate(BLAZEPOSE_TO_COCO) if coco >= 3)


def test_without_the_extra_the_message_says_what_to_install() -> None:
    try:
        import mediapipe  # noqa: F401
    except ImportError:
        with pytest.raises(PoseError, match="pip install --no-deps mediapipe"):
            mediapipe_pose()


@pytest.mark.skipif(not REAL.exists(), reason="the broadcast clips are not beside this repository")
def test_a_server_is_found_in_a_real_broadcast() -> None:
    near, far = find_players(REAL, split=0.4)
    assert (~np.isnan(near[:, 0])).mean() > 0.9
    x, y = (near[45, :2] + near[45, 2:] / 2).tolist()
    assert 950 < x < 1170  # the server at frame 45, read off the picture
    assert 580 < y < 820
    x, y = (far[45, :2] + far[45, 2:] / 2).tolist()
    assert 660 < x < 760
    assert 120 < y < 240
