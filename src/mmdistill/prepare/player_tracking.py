"""Where the near and the far player are: what moves before a camera that stands still.

Each frame is compared with the median of the video. What differs is grouped into blobs, and in each part of the picture
(feet above or below a dividing height) the smooth path through the blobs with the largest moving area is the player. A
moving camera, or a person who never moves, is not found: that person is then absent, never guessed.
"""

from pathlib import Path

import cv2
import numpy as np

from mmdistill.prepare.video import decode

WORK_HEIGHT = 360  # px, of the reduced picture that is searched
BACKGROUND_FRAMES = 25  # at least, where the video has them; twice as many at most
DIFFERENCE = 28  # grey levels, of the colour that differs most
SMALLEST = 50  # px of the reduced picture
PER_FRAME = 8  # blobs kept per frame and part
GAP = 20  # frames a player may be invisible between two of a path
REACH = 0.07  # picture heights that a player moves between two frames at the outside
SHORTEST = 5  # frames of a path
SMOOTH = 7  # frames, of the running median of a track's size


def find_players(path: Path, *, split: float) -> np.ndarray:
    """Boxes of the near and far player.

    Args:
        split: height that divides the picture, as a fraction from the top; a player with feet below it is near.

    Returns:
        float64 (2, T, 4): person 0 near, 1 far; left, top, width, height in px of the source; NaN where not found.

    Raises `VideoError` from decoding.
    """
    background, scale = _background(path)
    blobs = [_blobs(_reduce(frame.pixels), background) for frame in decode(path)]
    near, far = [], []
    for boxes in blobs:
        below = boxes[:, 1] + boxes[:, 3] > split * WORK_HEIGHT
        near.append(boxes[below][:PER_FRAME])
        far.append(boxes[~below][:PER_FRAME])
    return np.stack([_player(boxes) for boxes in (near, far)]) * scale


def _background(path: Path) -> tuple[np.ndarray, float]:
    """Median of frames spread evenly over the video, at `WORK_HEIGHT`, and source px per reduced px.

    The number of frames is not known beforehand: each `step`-th is kept, and when there are too many, every other one
    is dropped and the step doubled. So memory does not grow with the video.
    """
    kept: list[np.ndarray] = []
    step, scale = 1, 1.0
    for frame in decode(path):
        if frame.number % step == 0:
            kept.append(_reduce(frame.pixels))
            scale = frame.pixels.shape[0] / WORK_HEIGHT
        if len(kept) > 2 * BACKGROUND_FRAMES:
            kept, step = kept[::2], 2 * step
    return np.median(np.stack(kept), axis=0).astype(np.uint8), scale


def _reduce(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return cv2.resize(pixels, (round(width * WORK_HEIGHT / height), WORK_HEIGHT), interpolation=cv2.INTER_AREA)


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
    """(T, 4) boxes of the best path through the candidates, then of the best paths before and after it."""
    out = np.full((len(candidates), 4), np.nan)
    areas = [float(c[0, 2] * c[0, 3]) for c in candidates if len(c)]
    unit = float(np.median(areas)) if areas else 1.0
    todo = [(0, len(candidates))]
    while todo:
        first, last = todo.pop()
        path = _best_path(candidates[first:last], unit)
        if len(path) < SHORTEST:
            continue
        frames = [first + k for k, _ in path]
        boxes = np.stack([candidates[first + k][i] for k, i in path])
        between = np.arange(frames[0], frames[-1] + 1)
        out[between] = np.stack([np.interp(between, frames, boxes[:, i]) for i in range(4)], axis=1)
        todo += [(first, frames[0]), (frames[-1] + 1, last)]
    return out


def _best_path(candidates: list[np.ndarray], unit: float) -> list[tuple[int, int]]:
    """(frame, candidate) of the path with the largest sum of areas (in units of `unit`) minus the cost of its jumps.

    Dynamic programming. A step over g frames may skip up to `GAP` of them; a distance of `REACH` picture heights times
    sqrt(g) costs as much as one box of `unit` brings, and twice that distance is impossible.
    """
    best: list[np.ndarray] = []
    back: list[list[tuple[int, int] | None]] = []
    end: tuple[float, tuple[int, int] | None] = (0.0, None)
    for k, boxes in enumerate(candidates):
        score = boxes[:, 2] * boxes[:, 3] / unit
        origin: list[tuple[int, int] | None] = [None] * len(boxes)
        gain = np.zeros(len(boxes))
        for g in range(1, min(GAP, k) + 1):
            if not len(boxes) or not len(candidates[k - g]):
                continue
            apart = _centres(boxes)[:, None] - _centres(candidates[k - g])[None]
            distance = np.hypot(apart[..., 0], apart[..., 1]) / (REACH * WORK_HEIGHT * g**0.5)
            value = np.where(distance <= 2, best[k - g][None] - distance**2, -np.inf)
            for j in np.flatnonzero(value.max(axis=1) > gain):
                origin[j], gain[j] = (k - g, int(value[j].argmax())), value[j].max()
        best.append(score + gain)
        back.append(origin)
        if len(boxes) and best[k].max() > end[0]:
            end = (float(best[k].max()), (k, int(best[k].argmax())))
    path = []
    at = end[1]
    while at is not None:
        path.append(at)
        at = back[at[0]][at[1]]
    return path[::-1]


def _centres(boxes: np.ndarray) -> np.ndarray:
    """(..., 4) left, top, width, height -> (..., 2) x, y"""
    return boxes[..., :2] + boxes[..., 2:] / 2


def crops(boxes: np.ndarray, *, margin: float = 2.0) -> np.ndarray:
    """Square crops around boxes: (T, 4) -> (T, 3) left, top, side in px; all NaN if there is no box at all.

    The side is `margin` times the running median of the box's longer side, so that a racket or a shadow that joins the
    blob for a frame does not change it. A player who stands still becomes background: frames without a box look where
    the nearest one in time was, and the pose model decides whether somebody is there.
    """
    longer = np.fmax(boxes[:, 2], boxes[:, 3])
    known = np.flatnonzero(~np.isnan(longer))
    out = np.full((len(boxes), 3), np.nan)
    if len(known) == 0:
        return out
    for k in range(len(boxes)):
        at = known[np.abs(known - k).argmin()]
        side = margin * np.nanmedian(longer[max(0, at - SMOOTH) : at + SMOOTH + 1])
        out[k] = *(_centres(boxes[at]) - side / 2), side
    return out
