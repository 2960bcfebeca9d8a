"""Where something moves in a clip: weights of its tokens, for masks (``mask_type=motion``) and pooling.

Sources: MGMAE (Huang et al., ICCV 2023, arXiv 2308.10794) and UMT (Li et al., ICCV 2023, arXiv 2303.16058) keep tokens
visible by motion and by attention. Here a token is drawn with a probability that grows with its motion energy.

Shapes: T frames, H x W stored frame, M persons, J joints, L tokens of the grid (t, h, w).
"""

import cv2
import numpy as np

WEIGHT_OF_REST = 0.01  # of a token without motion; the mean energy of a clip is 1


def frame_difference(clip: np.ndarray) -> np.ndarray:
    """Mean over channels of ``|frame k + 1 - frame k|``; the last frame has the energy of the one before.

    uint8 (T, H, W, C) -> float32 (T, H, W), in gray levels; 0 for a single frame.
    """
    energy = np.zeros(clip.shape[:3], np.float32)
    for k in range(len(clip) - 1):
        difference = cv2.absdiff(clip[k], clip[k + 1])
        energy[k] = cv2.transform(difference.astype(np.float32), np.full((1, clip.shape[3]), 1 / clip.shape[3]))
    if len(clip) > 1:
        energy[-1] = energy[-2]
    return energy


def flow_magnitude(clip: np.ndarray) -> np.ndarray:
    """Length of each displacement. float (T, 2, H, W) in px -> float32 (T, H, W) in px."""
    x, y = clip.astype(np.float32).swapaxes(0, 1)
    length: np.ndarray = np.hypot(x, y)
    return length


def joint_displacement(rows: np.ndarray, frame_size: tuple[int, int]) -> np.ndarray:
    """Distance that each joint moves to the next frame, at the pixel of the joint; the sum over joints of a pixel.

    (T, M, J, 3), rows (x, y, score) in px with pixel centers at integers -> float32 (T, H, W) in px. Joints without a
    score, not finite or outside of the frame have none. The last frame has the energy of the one before.
    """
    energy = np.zeros((len(rows), *frame_size), np.float32)
    is_present = np.isfinite(rows).all(axis=-1) & (rows[..., 2] > 0)
    xy = np.where(is_present[..., None], rows[..., :2], 0)
    column, row = np.floor(xy + 0.5).astype(int)[:-1].transpose(3, 0, 1, 2)  # (T - 1, M, J)
    is_moving = is_present[:-1] & is_present[1:]
    is_moving &= (row >= 0) & (row < frame_size[0]) & (column >= 0) & (column < frame_size[1])
    distance = np.hypot(*np.diff(xy, axis=0).transpose(3, 0, 1, 2))
    k = np.broadcast_to(np.arange(len(rows) - 1)[:, None, None], row.shape)
    np.add.at(energy, (k[is_moving], row[is_moving], column[is_moving]), distance[is_moving])
    if len(rows) > 1:
        energy[-1] = energy[-2]
    return energy


def token_weights(energy: np.ndarray, crop_box: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """The mean energy of each token, relative to the mean of the clip, plus `WEIGHT_OF_REST`. float32 (L,).

    `energy` is float32 (T, H, W). `crop_box` is that of `CropSpec.draw_box`: top, left, height, width in px, flip.
    A clip without motion has the weight 1 everywhere.
    """
    t, h, w = grid
    top, left, height, width, flip = crop_box.round().astype(int).tolist()
    crop = energy[:, top : top + height, left : left + width]
    cells = np.stack([cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA) for frame in crop])  # (T, h, w)
    cells = cells[:, :, ::-1] if flip else cells
    tokens = cells.reshape(t, -1, h, w).mean(axis=1, dtype=np.float64).ravel()
    mean = tokens.mean()
    weights: np.ndarray = (tokens / mean + WEIGHT_OF_REST if mean > 0 else np.ones_like(tokens)).astype(np.float32)
    return weights
