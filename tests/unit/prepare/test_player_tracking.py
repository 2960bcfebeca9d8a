"""Player tracking: near and far player are found where they move, and crops follow them."""

from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.prepare.player_tracking import (
    CameraMotion,
    _find_person_changes,
    find_players,
    select_people,
    square_crops,
)
from mmdistill.prepare.video import decode_frames
from tests.generated_video import BroadcastClip, write_pan
from tests.unit.prepare.conftest import TwoPlayers, write_two_players


def box_centers(boxes: np.ndarray) -> np.ndarray:
    return boxes[:, :2] + boxes[:, 2:] / 2


def pan_offsets(count: int, amplitude: tuple[int, int], period: tuple[int, int]) -> np.ndarray:
    """(count, 2) x, y in px: sines with these amplitudes in px and periods in frames / 2 pi, not negative."""
    sines = np.sin(np.arange(count)[:, None] / np.array(period))
    return (np.array(amplitude) * (1 + sines)).round().astype(int)


def test_near_and_far_player_are_kept_apart(two_players: TwoPlayers) -> None:
    near, far = find_players(two_players.read, split=0.5).boxes
    np.testing.assert_allclose(box_centers(near), two_players.near, atol=5)
    first = two_players.far_start
    np.testing.assert_allclose(box_centers(far[first:]), two_players.far[first:], atol=5)
    assert np.isnan(far[:first]).all()


def test_players_who_run_do_not_become_other_persons(two_players: TwoPlayers) -> None:
    assert find_players(two_players.read, split=0.5).person_changes == ([], [])


@pytest.mark.parametrize(("first", "cut", "expected"), [(35, 99, [35]), (35, 35, []), (99, 99, [])])
def test_jump_to_another_person_is_reported_unless_there_is_a_cut(first: int, cut: int, expected: list[int]) -> None:
    """A person at x = 160 px, from frame `first` on another one at 410 px; the camera pans by 8 px per frame."""
    frames = np.arange(60)
    matrices = np.tile(np.eye(3), (60, 1, 1))
    matrices[:, 0, 2] = 8 * frames
    motion = CameraMotion(matrices, (frames >= cut).astype(int), np.ones(60, bool), False)
    boxes = np.tile([160.0, 200, 20, 50], (60, 1))
    boxes[:, 0] += 250 * (frames >= first) - 8 * frames
    boxes[20:33] = np.nan
    assert _find_person_changes(boxes, motion) == expected


def test_no_motion_gives_no_player(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "s.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(12):
        writer.write(np.full((48, 64, 3), 90, np.uint8))
    writer.release()
    boxes = find_players(partial(decode_frames, tmp_path / "s.avi"), split=0.5).boxes
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
    found = find_players(partial(decode_frames, broadcast.path), split=0.4)
    assert not found.camera_moves[court].any()
    assert not any(k < broadcast.cut for changes in found.person_changes for k in changes)
    for boxes, centers in zip(found.boxes, (broadcast.near, broadcast.far), strict=True):
        distance = np.hypot(*(box_centers(boxes[court]) - centers[court]).T)
        assert (distance < 15).mean() > 0.9


def test_a_moving_camera_is_compensated_and_reported(broadcast: BroadcastClip, tmp_path: Path) -> None:
    pan = pan_offsets(16, (150, 20), (12, 9))
    found = find_players(
        partial(decode_frames, write_pan(tmp_path / "pan.mp4", broadcast.path, pan, (660, 960))), split=0.4
    )
    assert found.camera_moves.mean() > 0.75  # a repeated frame does not move
    for boxes, centers in zip(found.boxes, (broadcast.near, broadcast.far), strict=True):
        distance = np.hypot(*(box_centers(boxes) + pan - centers[:16]).T)
        assert (distance < 20).mean() > 0.85


def test_players_at_the_net_keep_their_identity(tmp_path: Path) -> None:
    """The near player runs to the net and back: the feet cross the height that divides the image."""
    times = np.arange(60)
    near = np.stack([120 + 5 * times, 250 - (130 * np.sin(np.pi * times / 59)).astype(int)], axis=1)
    far = np.stack([560 - 3 * times, np.full(60, 60)], axis=1)
    found = find_players(write_two_players(tmp_path / "net.avi", near, far).read, split=0.5).boxes
    assert (near[:, 1] + 45 < 0.5 * 360).sum() > 10
    for boxes, centers in zip(found, (near, far), strict=True):
        np.testing.assert_allclose(box_centers(boxes), centers, atol=6)


def test_a_blob_as_wide_as_the_stadium_is_no_player(tmp_path: Path) -> None:
    """An advertising board that changes its content."""
    rng = np.random.default_rng(0)
    background = cv2.GaussianBlur(rng.integers(40, 90, (360, 640, 3), np.uint8), (0, 0), 3)
    writer = cv2.VideoWriter(str(tmp_path / "s.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (640, 360))
    for k in range(30):
        image = background.copy()
        image[40:110, 100:400] = (230, 230, 230) if k % 10 < 4 else (60, 60, 60)
        writer.write(image)
    writer.release()
    assert np.isnan(find_players(partial(decode_frames, tmp_path / "s.avi"), split=0.5).boxes).all()


@pytest.mark.parametrize("split", [0.0, 1.0])
def test_split_assigns_players_to_near_and_far(two_players: TwoPlayers, split: float) -> None:
    """With the division at the top of the image everybody is near, at the bottom everybody is far."""
    near, far = find_players(two_players.read, split=split).boxes
    empty, filled = (far, near) if split == 0 else (near, far)
    assert np.isnan(empty).all()
    assert not np.isnan(filled).all()


NO_PEOPLE = np.empty((0, 4))


def test_person_nearest_to_the_center_of_the_crop_is_selected() -> None:
    people = np.array([(0, 0, 10, 20), (42, 38, 10, 20), (50, 40, 10, 20)], float)
    crop = np.array([(0, 0, 100)], float)
    assert select_people([people], crop, max_offset=0.3) == [1]
    assert select_people([people[:1]], crop, max_offset=0.3) == [None]
    assert select_people([people[:1]], crop, max_offset=0.5) == [0]
    assert select_people([NO_PEOPLE], crop, max_offset=0.3) == [None]
    assert select_people([], np.empty((0, 3)), max_offset=0.3) == []


def test_two_crops_never_select_the_same_person() -> None:
    """Both crops show the same two persons, whose boxes differ by the rounding of the detector."""
    first, second = np.array((45, 40, 10, 20), float), np.array((70, 40, 10, 20), float)
    crops = np.array([(2, 0, 100), (20, 0, 100)], float)
    assert select_people([np.stack([first, second]), np.stack([second + 0.4, first + 0.4])], crops, max_offset=0.4) == [
        0,
        0,
    ]
    only = [first[None], first[None] + 0.4]
    assert select_people(only, crops, max_offset=0.4) == [0, None]
    assert select_people(only[::-1], crops[::-1], max_offset=0.4) == [None, 0]
