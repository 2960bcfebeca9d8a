"""Where the near and the far player are: what moves before a camera that stands still.

Each frame is compared with the median of the video. What differs is grouped into blobs, blobs are linked into tracks,
and in each part of the picture (feet above or below a dividing height) the track with the largest moving area is the
player. A moving camera, or a person who never moves, is not found: that person is then absent, never guessed.
"""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from mmdistill.prepare.video import decode

WORK_HEIGHT = 360  # px, of the reduced picture that is searched
BACKGROUND_FRAMES = 25
DIFFERENCE = 28  # grey levels, of the colour that differs most
SMALLEST = 50  # px of the reduced picture
PER_FRAME = 8  # blobs kept per frame and part
GAP = 20  # frames a track may be invisible
REACH = 0.07  # of the height, that a player moves between two frames at most
SMOOTH = 7  # frames, of the running median of a track's size


@dataclass
class _Track:
    frames: list[int] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)

    @property
    def weight(self) -> float:
        return float(sum(box[2] * box[3] for box in self.boxes))


def find_players(path: Path, *, split: float) -> np.ndarray:
    """Boxes of the near and far player.

    Args:
        split: height that divides the picture, as a fraction from the top; a player with feet below it is near.

    Returns:
        float64 (2, T, 4): person 0 near, 1 far; left, top, width, height in px of the source; NaN where not found.

    Raises `VideoError` from decoding.
    """
    reduced, scale = _reduced(path)
    step = max(1, len(reduced) // BACKGROUND_FRAMES)
    background = np.median(np.stack(reduced[::step][:BACKGROUND_FRAMES]), axis=0).astype(np.uint8)
    blobs = [_blobs(picture, background) for picture in reduced]
    near, far = [], []
    for boxes in blobs:
        below = boxes[:, 1] + boxes[:, 3] > split * WORK_HEIGHT
        near.append(boxes[below][:PER_FRAME])
        far.append(boxes[~below][:PER_FRAME])
    return np.stack([_player(boxes) for boxes in (near, far)]) * scale


def _reduced(path: Path) -> tuple[list[np.ndarray], float]:
    """All frames at `WORK_HEIGHT`, and source px per reduced px. 0.7 MB a frame at 16:9."""
    pictures, scale = [], 1.0
    for frame in decode(path):
        height, width = frame.pixels.shape[:2]
        scale = height / WORK_HEIGHT
        pictures.append(cv2.resize(frame.pixels, (round(width / scale), WORK_HEIGHT), interpolation=cv2.INTER_AREA))
    return pictures, scale


def _blobs(picture: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) of what differs, the largest area first."""
    moving = (cv2.absdiff(picture, background).max(axis=2) > DIFFERENCE).astype(np.uint8)
    closed = cv2.morphologyEx(moving, cv2.MORPH_CLOSE, np.ones((9, 5), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    stats = stats[1:]  # the first is the background
    person = (stats[:, 4] >= SMALLEST) & (stats[:, 2] < 3 * stats[:, 3]) & (stats[:, 3] < 0.9 * WORK_HEIGHT)
    stats = stats[person]
    return stats[np.argsort(-stats[:, 4], kind="stable"), :4].astype(np.float64)


def _player(candidates: list[np.ndarray]) -> np.ndarray:
    """(T, 4) box of the heaviest track, continued by others that begin or end where it is not."""
    out = np.full((len(candidates), 4), np.nan)
    for track in sorted(_link(candidates), key=lambda t: -t.weight):
        first, last = track.frames[0], track.frames[-1]
        if np.isnan(out).all() or _continues(out, track):
            between = np.arange(first, last + 1)
            boxes = np.stack(track.boxes)
            out[first : last + 1] = np.stack([np.interp(between, track.frames, boxes[:, i]) for i in range(4)], axis=1)
    return out


def _link(candidates: list[np.ndarray]) -> list[_Track]:
    tracks: list[_Track] = []
    for k, boxes in enumerate(candidates):
        free = list(boxes)
        for track in sorted((t for t in tracks if k - t.frames[-1] <= GAP), key=lambda t: -t.weight):
            reach = REACH * WORK_HEIGHT * (k - track.frames[-1]) ** 0.5 + 0.25 * track.boxes[-1][3]
            distances = [float(np.hypot(*(_centre(box) - _centre(track.boxes[-1])))) for box in free]
            if distances and min(distances) <= reach:
                track.boxes.append(free.pop(int(np.argmin(distances))))
                track.frames.append(k)
        tracks += [_Track([k], [box]) for box in free]
    return tracks


def _continues(out: np.ndarray, track: _Track) -> bool:
    """Whether a track lies in time beside what was found, near it and of its size."""
    first, last = track.frames[0], track.frames[-1]
    if len(track.frames) < 5 or not np.isnan(out[first : last + 1]).all():
        return False
    known = np.flatnonzero(~np.isnan(out[:, 0]))
    nearest = known[np.argmin(np.minimum(np.abs(known - first), np.abs(known - last)))]
    own = track.boxes[0] if nearest < first else track.boxes[-1]
    gap = first - nearest if nearest < first else nearest - last
    distance = float(np.hypot(*(_centre(own) - _centre(out[nearest]))))
    return distance <= REACH * WORK_HEIGHT * gap**0.5 + 0.5 * out[nearest][3] and own[3] > 0.4 * out[nearest][3]


def _centre(box: np.ndarray) -> np.ndarray:
    return box[:2] + box[2:] / 2


def crops(boxes: np.ndarray, *, margin: float = 1.6) -> np.ndarray:
    """Square crops around boxes: (T, 4) -> (T, 3) left, top, side in px; NaN stays NaN.

    The side is `margin` times the running median of the box's longer side, so that a racket or a shadow that joins the
    blob for a frame does not change it.
    """
    longer = np.fmax(boxes[:, 2], boxes[:, 3])
    out = np.full((len(boxes), 3), np.nan)
    for k in np.flatnonzero(~np.isnan(longer)):
        side = margin * np.nanmedian(longer[max(0, k - SMOOTH) : k + SMOOTH + 1])
        out[k] = *(_centre(boxes[k]) - side / 2), side
    return out
