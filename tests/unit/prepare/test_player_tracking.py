"""Player tracking: near and far player are found where they move, and crops follow them."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.prepare.player_tracking import find_players, square_crops
from tests.generated_video import BroadcastClip
from tests.unit.prepare.conftest import TwoPlayers


def box_centers(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, :2] + boxes[:, 2:] / 2


def test_near_and_far_player_are_kept_apart(two_players: TwoPlayers) -> None:
    near, far = find_players(two_players.path, split=0.5)
    np.testing.assert_allclose(box_centers(near), two_players.near, atol=5)
    first = two_players.far_start
    np.testing.assert_allclose(box_centers(far[first:]), two_players.far[first:], atol=5)
    assert np.isnan(far[:first]).all()


def test_no_motion_gives_no_player(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "s.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(12):
        writer.write(np.full((48, 64, 3), 90, np.uint8))
    writer.release()
    boxes = find_players(tmp_path / "s.avi", split=0.5)
    assert boxes.shape == (2, 12, 4)
    assert np.isnan(boxes).all()
    assert np.isnan(square_crops(boxes[0])).all()


def test_crops_are_square_and_keep_their_size() -> None:
    boxes = np.full((20, 4), np.nan)
    boxes[5:] = [100, 50, 20, 40]
    boxes[10] = [90, 40, 200, 60]  # a blob that includes a shadow
    crops = square_crops(boxes, margin=2.0)
    assert set(crops[:, 2]) == {80}
    np.testing.assert_allclose(crops[0], [70, 30, 80])  # before the first box, the crop is that of the first box


def test_players_of_a_generated_broadcast_are_found_until_the_cut(broadcast: BroadcastClip) -> None:
    court = slice(0, broadcast.cut)
    for boxes, centers in zip(find_players(broadcast.path, split=0.4), (broadcast.near, broadcast.far), strict=True):
        distance = np.hypot(*(box_centers(boxes[court]) - centers[court]).T)
        assert (distance < 15).mean() > 0.9


def test_server_of_a_real_broadcast_is_found(real_broadcasts: Path) -> None:
    near, far = find_players(real_broadcasts / "clip3.mp4", split=0.4)
    assert (~np.isnan(near[:, 0])).mean() > 0.9
    x, y = box_centers(near)[45].tolist()
    assert 950 < x < 1170  # position of the server in frame 45, read off the image
    assert 580 < y < 820
    x, y = box_centers(far)[45].tolist()
    assert 660 < x < 760
    assert 120 < y < 240


@pytest.mark.parametrize("split", [0.0, 1.0])
def test_split_assigns_players_to_near_and_far(two_players: TwoPlayers, split: float) -> None:
    """With the division at the top of the image everybody is near, at the bottom everybody is far."""
    near, far = find_players(two_players.path, split=split)
    empty, filled = (far, near) if split == 0 else (near, far)
    assert np.isnan(empty).all()
    assert not np.isnan(filled).all()
