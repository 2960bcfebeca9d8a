"""Detection and tracking of the near and the far player as motion in front of a static camera.

Each frame is compared with the median of the video, and differing pixels are grouped into blobs. The image is divided
at a height: blobs with their feet below it belong to the near player, the others to the far player. Each player is the
smooth track through the blobs with the largest area. The method does not work with a moving camera. A person who never
moves is not found and is reported as absent, never guessed.
"""

from pathlib import Path

import cv2
import numpy as np

from mmdistill.prepare.video import decode_frames

WORK_HEIGHT = 360  # px; blobs are searched in an image of this height
BACKGROUND_FRAMES = 25  # minimum, if the video has them; the maximum is twice as many
MIN_DIFFERENCE = 28  # gray levels, of the color channel that differs most
MIN_BLOB_AREA = 50  # px of the reduced image
MAX_BLOBS = 8  # per frame and player
MAX_GAP = 20  # frames between two boxes of a track
STEP_SCALE = 0.07  # image heights; an upper bound of a player's motion between two frames
MIN_TRACK_BOXES = 5
SMOOTHING_RADIUS = 7  # frames, of the running median of the box size


def find_players(path: Path, *, split: float) -> np.ndarray:
    """Boxes of the near and the far player of a video.

    `split` is the height that divides the image, as a fraction from the top. A player with feet below it is near. The
    result is float64 (2, T, 4): near (0) and far (1); left, top, width, height in px of the source; NaN: not found.

    Raises:
        VideoError: the video cannot be decoded.
    """
    background, scale = _median_background(path)
    near, far = [], []
    for frame in decode_frames(path):
        boxes = _find_moving_blobs(_reduce(frame.pixels), background)
        is_near = boxes[:, 1] + boxes[:, 3] > split * WORK_HEIGHT
        near.append(boxes[is_near][:MAX_BLOBS])
        far.append(boxes[~is_near][:MAX_BLOBS])
    return np.stack([_track_player(boxes) for boxes in (near, far)]) * scale


def _median_background(path: Path) -> tuple[np.ndarray, float]:
    """Median of evenly spaced frames at `WORK_HEIGHT`, and source px per reduced px.

    The length of the video is not known in advance. Every `step`-th frame is kept; when there are too many, every
    second one is dropped and the step is doubled. The memory use is therefore independent of the length.
    """
    kept: list[np.ndarray] = []
    step, scale = 1, 1.0
    for frame in decode_frames(path):
        if frame.number % step == 0:
            kept.append(_reduce(frame.pixels))
            scale = frame.pixels.shape[0] / WORK_HEIGHT
        if len(kept) > 2 * BACKGROUND_FRAMES:
            kept, step = kept[::2], 2 * step
    return np.median(np.stack(kept), axis=0).astype(np.uint8), scale


def _reduce(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return cv2.resize(pixels, (round(width * WORK_HEIGHT / height), WORK_HEIGHT), interpolation=cv2.INTER_AREA)


def _find_moving_blobs(image: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) of the pixels that differ from the background, largest area first."""
    differs = (cv2.absdiff(image, background).max(axis=2) > MIN_DIFFERENCE).astype(np.uint8)
    closed = cv2.morphologyEx(differs, cv2.MORPH_CLOSE, np.ones((9, 5), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    _, _, width, height, area = stats.T
    is_person = (area >= MIN_BLOB_AREA) & (width < 3 * height) & (height < 0.9 * WORK_HEIGHT)
    is_person[0] = False  # the background
    people = stats[is_person]
    boxes: np.ndarray = people[np.argsort(-people[:, 4], kind="stable"), :4].astype(np.float64)
    return boxes


def _track_player(candidates: list[np.ndarray]) -> np.ndarray:
    """Boxes (T, 4) of the best track through the candidates, and of the best tracks before and after it."""
    out = np.full((len(candidates), 4), np.nan)
    area_unit = float(np.median([c[0, 2] * c[0, 3] for c in candidates if len(c)] or [1.0]))
    intervals = [(0, len(candidates))]
    while intervals:
        first, last = intervals.pop()
        track = _find_best_track(candidates[first:last], area_unit)
        if len(track) < MIN_TRACK_BOXES:
            continue
        frames = [first + k for k, _ in track]
        boxes = np.stack([candidates[first + k][i] for k, i in track])
        covered = np.arange(frames[0], frames[-1] + 1)
        out[covered] = np.stack([np.interp(covered, frames, boxes[:, i]) for i in range(4)], axis=1)
        intervals += [(first, frames[0]), (frames[-1] + 1, last)]
    return out


def _find_best_track(candidates: list[np.ndarray], area_unit: float) -> list[tuple[int, int]]:
    """(frame, candidate) pairs of the track with the highest score, found by dynamic programming.

    The score is the sum of box areas, in multiples of `area_unit`, minus the cost of the steps. A step spans g frames,
    at most `MAX_GAP`, and costs (distance / (STEP_SCALE * WORK_HEIGHT * sqrt(g)))². Steps with a cost above 4 are not
    allowed.
    """
    scores: list[np.ndarray] = []  # per frame and candidate, of the best track that ends there
    predecessors: dict[tuple[int, int], tuple[int, int]] = {}
    for k, boxes in enumerate(candidates):
        gain = np.zeros(len(boxes))
        for g in range(1, min(MAX_GAP, k) + 1):
            if not len(boxes) or not len(candidates[k - g]):
                continue
            offset = _box_centers(boxes)[:, None] - _box_centers(candidates[k - g])[None]
            distance = np.hypot(offset[..., 0], offset[..., 1]) / (STEP_SCALE * WORK_HEIGHT * g**0.5)
            value = np.where(distance <= 2, scores[k - g][None] - distance**2, -np.inf)
            for j in np.flatnonzero(value.max(axis=1) > gain).tolist():
                predecessors[k, j], gain[j] = (k - g, int(value[j].argmax())), value[j].max()
        scores.append(boxes[:, 2] * boxes[:, 3] / area_unit + gain)
    ends = [(float(score), k, i) for k, row in enumerate(scores) for i, score in enumerate(row)]
    if not ends:
        return []
    _, *end = max(ends, key=lambda e: e[0])
    track = [(end[0], end[1])]
    while track[-1] in predecessors:
        track.append(predecessors[track[-1]])
    return track[::-1]


def _box_centers(boxes: np.ndarray) -> np.ndarray:
    """(..., 4) left, top, width, height -> (..., 2) x, y."""
    return boxes[..., :2] + boxes[..., 2:] / 2


def square_crops(boxes: np.ndarray, *, margin: float = 2.0) -> np.ndarray:
    """Square crops around boxes: (T, 4) -> (T, 3) left, top, side in px; all NaN if there is no box at all.

    The side is `margin` times the running median of the longer box side, so that a racket or a shadow that joins the
    blob for one frame does not change it. A player who stands still becomes background. Frames without a box therefore
    use the box of the nearest frame that has one, and the pose model decides whether a person is there.
    """
    longer = np.fmax(boxes[:, 2], boxes[:, 3])
    with_box = np.flatnonzero(~np.isnan(longer))
    out = np.full((len(boxes), 3), np.nan)
    if len(with_box) == 0:
        return out
    for k in range(len(boxes)):
        nearest = with_box[np.abs(with_box - k).argmin()]
        side = margin * np.nanmedian(longer[max(0, nearest - SMOOTHING_RADIUS) : nearest + SMOOTHING_RADIUS + 1])
        out[k] = *(_box_centers(boxes[nearest]) - side / 2), side
    return out
