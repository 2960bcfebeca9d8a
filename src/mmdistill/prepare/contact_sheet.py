"""A JPEG per video that shows whether its skeletons are right: evenly spaced frames with the drawn joints."""

from pathlib import Path

import cv2
import numpy as np

from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import COCO17

PLAYERS = ("near", "far")
COLORS = ((60, 60, 255), (255, 160, 0))  # BGR of the near and the far player: red, blue
COLUMNS, ROWS, TILE_HEIGHT = 3, 4, 270  # of the sheet; height in px
DETAIL = TILE_HEIGHT // 2  # px, side of the enlarged image of a player
DETAIL_MARGIN = 1.5  # side of this image, as a multiple of the extent of the joints
MIN_EXTENT = 16  # px of the source, of the joints
LOW_SCORE = 0.3  # joints with a lower score are hollow circles
JPEG_QUALITY = 75


class ContactSheet:
    """Every n-th frame of a video with its skeletons, and an enlarged image of each player next to it.

    Args:
        num_frames: frames of the video; n is such that `COLUMNS` x `ROWS` frames are shown.
    """

    def __init__(self, num_frames: int) -> None:
        self.shown = set(np.linspace(0, num_frames - 1, COLUMNS * ROWS).round().astype(int).tolist())
        self._tiles: list[np.ndarray] = []

    def add(self, number: int, pixels: np.ndarray, rows: np.ndarray) -> None:
        """Draw frame `number`, uint8 (H, W, 3) BGR with rows (2, 17, 3) in its px, if it is one of those shown."""
        if number in self.shown:
            self._tiles.append(draw_tile(pixels, rows, f"frame {number}"))

    def write(self, path: Path) -> None:
        """Write the frames added so far as one image."""
        tiles = self._tiles + [np.zeros_like(self._tiles[0])] * (-len(self._tiles) % COLUMNS)
        lines = [np.hstack(tiles[k : k + COLUMNS]) for k in range(0, len(tiles), COLUMNS)]
        image = cv2.imencode(".jpg", np.vstack(lines), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        atomic_write_bytes(path, image.tobytes())


def draw_tile(pixels: np.ndarray, rows: np.ndarray, title: str) -> np.ndarray:
    """A frame of height `TILE_HEIGHT` with its skeletons (2, 17, 3), and both players enlarged, far and near."""
    scale = TILE_HEIGHT / pixels.shape[0]
    size = (round(pixels.shape[1] * scale), TILE_HEIGHT)
    frame: np.ndarray = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    for joints, color in zip(rows, COLORS, strict=True):
        _draw_skeleton(frame, _scale_joints(joints, (0, 0), scale), color, radius=1)
    _write_text(frame, title)
    details = [_draw_player(pixels, rows[person], PLAYERS[person], COLORS[person]) for person in (1, 0)]
    return np.hstack([frame, np.vstack(details)])


def _draw_player(pixels: np.ndarray, joints: np.ndarray, name: str, color: tuple[int, int, int]) -> np.ndarray:
    """The square around the joints of a player, enlarged to `DETAIL` px; black if the player was not found."""
    found = joints[joints[:, 2] > 0, :2]
    image: np.ndarray = np.zeros((DETAIL, DETAIL, 3), np.uint8)
    if len(found):
        low, high = found.min(axis=0), found.max(axis=0)
        side = DETAIL_MARGIN * max(MIN_EXTENT, float((high - low).max()))
        corner = (low + high + 1 - side) / 2  # of px edges, not of px centers
        scale = DETAIL / side
        shift = (0.5 - corner) * scale - 0.5  # pixel centers are at integers in both images
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        image = cv2.warpAffine(pixels, matrix, (DETAIL, DETAIL), flags=cv2.INTER_LINEAR)
        _draw_skeleton(image, _scale_joints(joints, corner, scale), color, radius=2)
    _write_text(image, name if len(found) else f"{name}: not found")
    cv2.rectangle(image, (0, 0), (DETAIL - 1, DETAIL - 1), color, 2)
    return image


def _scale_joints(joints: np.ndarray, corner: tuple[float, float] | np.ndarray, scale: float) -> np.ndarray:
    """Joints (17, 3) in px of a part of the image with this upper left corner, enlarged by `scale`."""
    xy = (joints[:, :2] + 0.5 - corner) * scale - 0.5
    return np.hstack([xy, joints[:, 2:]])


def _draw_skeleton(image: np.ndarray, joints: np.ndarray, color: tuple[int, int, int], *, radius: int) -> None:
    """Draw the joints that have a score, and the limbs between them. The other joints may have any position."""
    points = {j: joints[j, :2].round().astype(int).tolist() for j in np.flatnonzero(joints[:, 2] > 0).tolist()}
    for a, b in COCO17.limb_positions:
        if a in points and b in points:
            cv2.line(image, points[a], points[b], color, 1, cv2.LINE_AA)
    for joint, point in points.items():
        cv2.circle(image, point, radius, color, 1 if joints[joint, 2] < LOW_SCORE else -1, cv2.LINE_AA)


def _write_text(image: np.ndarray, text: str) -> None:
    """White text with a dark outline in the upper left corner."""
    for color, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(image, text, (6, 18), cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, thickness, cv2.LINE_AA)
