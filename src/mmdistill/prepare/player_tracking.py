"""Detection and tracking of the near and the far player as motion in front of a background.

Each frame is compared with a background, and differing pixels are grouped into blobs. With a static camera, the
background is the median of the video. With a moving camera, it is the median of frames before and after, which are
warped to the frame. Blobs with their feet below a height belong to the near player, the others to the far player, and
each player is the smooth track through the blobs with the largest area. A track may cross that height by `NET_MARGIN`.
A person who does not move is not found and is reported as absent, never guessed.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from mmdistill.prepare.video import Frame

WORK_HEIGHT = 360  # px; blobs are searched in an image of this height
BACKGROUND_FRAMES = 25  # minimum, if the video has them; the maximum is twice as many
MIN_DIFFERENCE = 28  # gray levels, of the color channel that differs most
MIN_BLOB_AREA = 50  # px of the reduced image
MAX_BLOB_HEIGHT, MAX_BLOB_WIDTH = 0.6, 0.3  # image heights, image widths; larger blobs are no player
MIN_FILL = 0.2  # differing pixels of a blob, as a fraction of its box; misaligned court lines have less
MAX_BLOBS = 8  # per frame and player
MAX_GAP = 20  # frames between two boxes of a track
STEP_SCALE = 0.07  # image heights; an upper bound of a player's motion between two frames
MIN_TRACK_BOXES = 5
SMOOTHING_RADIUS = 7  # frames, of the running median of the box size
NET_MARGIN = 0.15  # image heights by which a player at the net crosses the height that divides the image
CORNERS = 200  # image points whose motion gives that of the camera
MIN_INLIERS = 20  # points that agree on a motion; fewer mean a cut
REPROJECTION_ERROR = 1.5  # px, of a point that agrees
CAMERA_STEP, CAMERA_DRIFT = 0.5, 3.0  # px; a larger motion of an image corner per frame, per shot is camera motion
WINDOW = 40  # frames before and after a frame, whose median is its background under a moving camera

ReadFrames = Callable[[], Iterable[Frame]]  # starts at the first frame in each call


@dataclass(frozen=True)
class CameraMotion:
    """Motion of the camera, in px of the reduced image.

    Attributes:
        to_reference: float64 (T, 3, 3); maps points of each frame to the first frame of its shot.
        shot: int64 (T,); number of the shot that each frame belongs to.
        moves: bool (T,); whether the camera moves between the frame and the previous one.
        is_static: whether no image corner drifts by more than `CAMERA_DRIFT` within a shot.
    """

    to_reference: np.ndarray
    shot: np.ndarray
    moves: np.ndarray
    is_static: bool


@dataclass(frozen=True)
class PlayerBoxes:
    """Boxes of the near and the far player.

    Attributes:
        boxes: float64 (2, T, 4); near (0) and far (1); left, top, width, height in px of the source; NaN: not found.
        camera_moves: bool (T,); whether the camera moves at the frame.
        person_changes: of the near and the far player, the frames from which on the boxes probably show another person,
            because no player moves that fast. Cuts are not listed.
    """

    boxes: np.ndarray
    camera_moves: np.ndarray
    person_changes: tuple[list[int], list[int]] = ([], [])


def find_players(read: ReadFrames, *, split: float) -> PlayerBoxes:
    """Find the near and the far player of a video, of which `read` yields the frames.

    `split` is the height that divides the image, as a fraction from the top. A player with feet below it is near.

    Raises:
        VideoError: the video cannot be decoded.
    """
    background, motion, scale = _analyze(read)
    near, far = [], []
    for image, local in _with_backgrounds(read, background, motion):
        boxes = _find_moving_blobs(image, local, tolerance=0 if motion.is_static else 1)
        feet = boxes[:, 1] + boxes[:, 3]
        near.append(boxes[feet > (split - NET_MARGIN) * WORK_HEIGHT])
        far.append(boxes[feet <= (split + NET_MARGIN) * WORK_HEIGHT])
    near_boxes = _track_player(near, lambda feet: feet > split * WORK_HEIGHT)
    others = [found[~_overlaps(found, box)] for found, box in zip(far, near_boxes, strict=True)]
    far_boxes = _track_player(others, lambda feet: feet <= split * WORK_HEIGHT)
    changes = (_find_person_changes(near_boxes, motion), _find_person_changes(far_boxes, motion))
    return PlayerBoxes(np.stack([near_boxes, far_boxes]) * scale, motion.moves, changes)


def _analyze(read: ReadFrames) -> tuple[np.ndarray, CameraMotion, float]:
    """Median of evenly spaced frames at `WORK_HEIGHT`, the camera's motion, and source px per reduced px.

    The length of the video is not known in advance. Every `step`-th frame is kept; when there are too many, every
    second one is dropped and the step is doubled. The memory use is therefore independent of the length.
    """
    kept: list[np.ndarray] = []
    matrices, shots, moves = [np.eye(3)], [0], [False]
    step, scale, previous = 1, 1.0, None
    for frame in read():
        image = _reduce(frame.pixels)
        gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        if previous is not None:
            matrix = _camera_step(gray, previous)
            shots.append(shots[-1] + (matrix is None))
            moves.append(matrix is not None and _corner_shift(matrix) > CAMERA_STEP)
            matrices.append(np.eye(3) if matrix is None else matrices[-1] @ matrix)
        previous = gray
        if frame.number % step == 0:
            kept.append(image)
            scale = frame.pixels.shape[0] / WORK_HEIGHT
        if len(kept) > 2 * BACKGROUND_FRAMES:
            kept, step = kept[::2], 2 * step
    background = np.median(np.stack(kept), axis=0).astype(np.uint8)
    is_static = all(_corner_shift(matrix) <= CAMERA_DRIFT for matrix in matrices)
    return background, CameraMotion(np.stack(matrices), np.array(shots), np.array(moves), is_static), scale


def _camera_step(gray: np.ndarray, previous: np.ndarray) -> np.ndarray | None:
    """Homography (3, 3) that maps points of a frame to the previous frame; None at a cut. Players are outliers."""
    corners = cv2.goodFeaturesToTrack(gray, CORNERS, qualityLevel=0.01, minDistance=8)
    if corners is None or len(corners) < MIN_INLIERS:
        return np.eye(3)  # a plain image: nothing to compare
    moved, found, _ = cv2.calcOpticalFlowPyrLK(gray, previous, corners, corners.copy())
    found = found.ravel() == 1
    if found.sum() < MIN_INLIERS:
        return None
    matrix, inliers = cv2.findHomography(corners[found], moved[found], cv2.RANSAC, REPROJECTION_ERROR)
    if matrix is None or inliers.sum() < max(MIN_INLIERS, found.sum() / 2):
        return None
    return np.asarray(matrix, np.float64)


def _corner_shift(matrix: np.ndarray) -> float:
    """Largest distance by which a homography moves a corner of the reduced image, for an aspect ratio of 16:9."""
    width, height = WORK_HEIGHT * 16 / 9, float(WORK_HEIGHT)
    corners = np.array([[[0, 0], [width, 0], [0, height], [width, height]]])
    return float(np.linalg.norm(cv2.perspectiveTransform(corners, matrix) - corners, axis=2).max())


def _with_backgrounds(
    read: ReadFrames, background: np.ndarray, motion: CameraMotion
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each frame at `WORK_HEIGHT` with its background."""
    if motion.is_static:
        for frame in read():
            yield _reduce(frame.pixels), background
        return
    window: deque[np.ndarray] = deque(maxlen=2 * WINDOW + 1)  # the newest frames
    total, done = len(motion.shot), 0
    for frame in read():
        window.append(_reduce(frame.pixels))
        while done < total and (frame.number >= done + WINDOW or frame.number == total - 1):
            first = frame.number + 1 - len(window)
            yield window[done - first], _local_background(window, first, done, motion)
            done += 1


def _local_background(window: Sequence[np.ndarray], first: int, number: int, motion: CameraMotion) -> np.ndarray:
    """Median of five frames of the same shot around frame `number`, warped to it.

    `window` holds the frames from number `first` on. Pixels that another frame does not show are those of the frame.
    """
    image = window[number - first]
    shot = np.flatnonzero(motion.shot == motion.shot[number])
    low, high = max(first, shot[0], number - WINDOW), min(first + len(window) - 1, shot[-1], number + WINDOW)
    to_frame = np.linalg.inv(motion.to_reference[number])
    warped = []
    gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    for other in np.linspace(low, high, 5).round().astype(int).tolist():
        matrix = to_frame @ motion.to_reference[other]
        rough = _warp(window[other - first], matrix, image)
        error = _camera_step(cv2.cvtColor(rough, cv2.COLOR_BGR2GRAY), gray)  # which the steps in between add up to
        warped.append(rough if error is None else _warp(window[other - first], error @ matrix, image))
    a, b, c, d, e = warped
    low_pair, high_pair = cv2.max(cv2.min(a, b), cv2.min(c, d)), cv2.min(cv2.max(a, b), cv2.max(c, d))
    middle: np.ndarray = cv2.max(cv2.min(low_pair, high_pair), cv2.min(cv2.max(low_pair, high_pair), e))
    return middle  # the median of five, by minima and maxima of pairs


def _warp(image: np.ndarray, matrix: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """Warp an image by a homography. Pixels that it does not cover are those of `outside`."""
    size = (image.shape[1], image.shape[0])
    out: np.ndarray = cv2.warpPerspective(image, matrix, size, dst=outside.copy(), borderMode=cv2.BORDER_TRANSPARENT)
    return out


def _reduce(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return cv2.resize(pixels, (round(width * WORK_HEIGHT / height), WORK_HEIGHT), interpolation=cv2.INTER_AREA)


def _find_moving_blobs(image: np.ndarray, background: np.ndarray, *, tolerance: int) -> np.ndarray:
    """Boxes (n, 4) of the pixels that differ from the background, largest area first.

    A pixel may have any value that the background has within `tolerance` px, because warped frames are not exact.
    """
    window = np.ones((2 * tolerance + 1, 2 * tolerance + 1), np.uint8)
    below, above = cv2.erode(background, window), cv2.dilate(background, window)
    difference = cv2.max(cv2.subtract(below, image), cv2.subtract(image, above)).max(axis=2)
    differs = (difference > MIN_DIFFERENCE).astype(np.uint8)
    closed = cv2.morphologyEx(differs, cv2.MORPH_CLOSE, np.ones((9, 5), np.uint8))
    _, _, stats, _ = cv2.connectedComponentsWithStats(closed, connectivity=8)
    _, _, width, height, area = stats.T
    is_person = (area >= MIN_BLOB_AREA) & (width < 3 * height) & (height < MAX_BLOB_HEIGHT * WORK_HEIGHT)
    is_person &= (width < MAX_BLOB_WIDTH * image.shape[1]) & (area > MIN_FILL * width * height)
    is_person[0] = False  # the background
    people = stats[is_person]
    boxes: np.ndarray = people[np.argsort(-people[:, 4], kind="stable"), :4].astype(np.float64)
    return boxes


def _overlaps(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Whether the center of each box (n, 4) lies in `box` (4); none does in a box of NaN."""
    offset = np.abs(_box_centers(boxes) - _box_centers(box)) * 2
    inside: np.ndarray = (offset <= box[2:]).all(axis=1)
    return inside


def _track_player(candidates: list[np.ndarray], on_own_side: Callable[[float], bool]) -> np.ndarray:
    """Boxes (T, 4) of the best track through the candidates, and of the best tracks before and after it.

    The feet of most boxes of a track satisfy `on_own_side`. Other tracks are those of the other player at the net.
    """
    candidates = [found[:MAX_BLOBS] for found in candidates]
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
        if on_own_side(float(np.median(boxes[:, 1] + boxes[:, 3]))):
            out[covered] = np.stack([np.interp(covered, frames, boxes[:, i]) for i in range(4)], axis=1)
        intervals += [(first, frames[0]), (frames[-1] + 1, last)]
    return out


def _find_person_changes(boxes: np.ndarray, motion: CameraMotion) -> list[int]:
    """Frames whose box (T, 4) is further from the previous box of the same shot than a step of a track may be.

    Positions are those in the first frame of the shot, without the motion of the camera.
    """
    with_box = np.flatnonzero(~np.isnan(boxes[:, 0]))
    centers = {
        k: cv2.perspectiveTransform(_box_centers(boxes[k])[None, None], motion.to_reference[k])[0, 0]
        for k in with_box.tolist()
    }
    changes = []
    for a, b in itertools.pairwise(centers):
        limit = 2 * STEP_SCALE * WORK_HEIGHT * (b - a) ** 0.5  # cost of 4, see `_find_best_track`
        if motion.shot[a] == motion.shot[b] and np.hypot(*(centers[b] - centers[a])) > limit:
            changes.append(b)
    return changes


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


def select_people(people: Sequence[np.ndarray], crops: np.ndarray, *, max_offset: float) -> list[int | None]:
    """Select the person in each crop who is nearest to its center; None: there is none.

    Two crops never select the same person: of two boxes that contain the center of each other, the one nearer to its
    crop center is selected.

    Args:
        people: per crop, boxes (n, 4) left, top, width, height of all persons in it.
        crops: (len(people), 3) left, top, side. Boxes and crops are in the same px.
        max_offset: crop sides between the centers of the crop and of a selected box, vertical and horizontal.
    """
    offsets = []
    for boxes, (left, top, side) in zip(people, crops, strict=True):
        distance = np.abs(_box_centers(boxes) - (left + side / 2, top + side / 2)).max(axis=1) / side
        offsets.append(np.where(distance <= max_offset, distance, np.inf))
    selected: list[int | None] = [None] * len(people)
    for crop in sorted(range(len(people)), key=lambda k: offsets[k].min(initial=np.inf)):
        taken = [people[k][i] for k, i in enumerate(selected) if i is not None]
        for i in np.argsort(offsets[crop], kind="stable").tolist():
            box = people[crop][i]
            is_taken = any(_overlaps(box[None], other)[0] and _overlaps(other[None], box)[0] for other in taken)
            if np.isfinite(offsets[crop][i]) and not is_taken:
                selected[crop] = i
                break
    return selected
