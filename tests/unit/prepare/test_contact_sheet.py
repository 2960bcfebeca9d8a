"""Contact sheets: every n-th frame, joints at their places in the frame and in the enlarged images of the players."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.prepare.contact_sheet import COLORS, ContactSheet, draw_tile

FRAME, FAR, NEAR = (slice(270), slice(480)), (slice(135), slice(480, 615)), (slice(135, 270), slice(480, 615))


def skeletons(**joints: tuple[int, float, float, float]) -> np.ndarray:
    """(2, 17, 3) with one joint per player, given as (joint, x, y, score)."""
    rows = np.zeros((2, 17, 3), np.float32)
    for player, (joint, *values) in joints.items():
        rows[("near", "far").index(player), joint] = values
    return rows


def is_drawn(tile: np.ndarray, part: tuple[slice, slice], x: float, y: float, person: int) -> bool:
    """Whether the pixel (x, y) of a part of the tile has the color of a player."""
    found = tile[part][round(y), round(x)].astype(int)
    return bool(np.abs(found - COLORS[person]).max() < 90)


def test_frame_number_is_visible_on_white_and_on_black() -> None:
    for level in (0, 255):
        image = np.full((270, 480, 3), level, np.uint8)
        tile = draw_tile(image, np.zeros((2, 17, 3), np.float32), "frame 7")[FRAME]
        assert np.abs(tile.astype(int) - level).max() > 200
        assert {tile.min() < 60, tile.max() > 200} == {True}


def test_joints_lie_on_the_same_pixels_in_the_frame_and_in_the_enlarged_images() -> None:
    """Each player is a white point with a joint at its center, in a frame of 1080 lines."""
    pixels = np.zeros((1080, 1920, 3), np.uint8)
    rows = np.zeros((2, 17, 3), np.float32)
    for person, (x, y) in enumerate([(900, 800), (700, 300)]):
        cv2.circle(pixels, (x, y), 12, (255, 255, 255), -1)
        rows[person, 0], rows[person, 5], rows[person, 16] = (x, y, 1), (x - 60, y - 60, 1), (x + 60, y + 60, 1)
    tile = draw_tile(pixels, rows, "")
    assert tile.shape == (270, 615, 3)
    assert is_drawn(tile, FRAME, 900 / 4, 800 / 4, 0)
    assert is_drawn(tile, FRAME, 700 / 4, 300 / 4, 1)
    for part, person in ((NEAR, 0), (FAR, 1)):
        assert is_drawn(tile, part, 67, 67, person)  # joint 0 is in the center of the square, 180 px of the source
        assert is_drawn(tile, part, 67 - 60 * 135 / 180, 67 - 60 * 135 / 180, person)
        assert (tile[part][67, 73] > 200).all()  # the white point has a radius of 9 px, the joint of 2 px
        assert (tile[part][67, 80] < 60).all()


@pytest.mark.parametrize(("score", "is_filled"), [(0.9, True), (0.1, False)])
def test_joint_with_a_low_score_is_hollow(score: float, is_filled: bool) -> None:
    tile = draw_tile(np.zeros((270, 480, 3), np.uint8), skeletons(near=(0, 240, 135, score)), "")
    assert is_drawn(tile, NEAR, 69, 67, 0)
    assert is_drawn(tile, NEAR, 67, 67, 0) == is_filled


def test_player_who_is_not_found_is_black_and_named() -> None:
    gray = np.full((270, 480, 3), 120, np.uint8)
    tile = draw_tile(gray, skeletons(near=(0, 240, 135, 1)), "")
    assert tile[FAR][60:130, 5:130].max() == 0
    assert tile[FAR][5:25, 40:120].max() > 200  # the words "not found"
    assert tile[NEAR][60:130, 5:130].max() >= 120
    assert tile[NEAR][5:25, 60:120].max() < 200


def test_joint_outside_the_image_is_shown_beside_it() -> None:
    tile = draw_tile(np.full((270, 480, 3), 120, np.uint8), skeletons(near=(0, -5, 100, 1)), "")
    assert is_drawn(tile, NEAR, 67, 67, 0)
    assert tile[NEAR][100, 20].max() == 0  # left of the image


@pytest.mark.parametrize(("frames", "expected"), [(1, [0]), (5, [0, 1, 2, 3, 4]), (111, list(range(0, 111, 10)))])
def test_every_nth_frame_is_shown(tmp_path: Path, frames: int, expected: list[int]) -> None:
    sheet = ContactSheet(frames)
    assert sorted(sheet.shown) == expected
    for number in range(frames):
        level = 250 if number in expected else 0
        sheet.add(number, np.full((90, 160, 3), level, np.uint8), np.zeros((2, 17, 3), np.float32))
    sheet.write(tmp_path / "sheets/v.jpg")
    image = cv2.imread(str(tmp_path / "sheets/v.jpg"))
    rows = -(-len(expected) // 3)
    assert image.shape == (270 * rows, 3 * 615, 3)
    bright = [image[270 * (k // 3) + 100, 615 * (k % 3) + 100].min() > 200 for k in range(3 * rows)]
    assert bright == [k < len(expected) for k in range(3 * rows)]
