"""Tensor operations from raw clips to model input, on the device: crop, resize, flip, normalize, render heat-maps.

Each modality composes them in its `preprocess` method, see `mmdistill.modalities`. The same crop box is applied to
every modality of a clip, so that a joint, its pixel and its displacement stay at the same position.

Shapes: B batch, C channels, T frames, H x W stored frame, h x w model input, M persons, J joints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a small tensor from the CPU. ``torch.tensor(..., device=...)`` and plain `to` would wait for the GPU."""
    return values.to(device, non_blocking=True)


def normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(x - mean) / std`` per channel, in place. (B, C, T, h, w) -> same."""
    means, stds = (to_device(torch.tensor(values), x.device).view(-1, 1, 1, 1) for values in (mean, std))
    return x.sub_(means).div_(stds)


def subtract_median(flow: Tensor, *, max_pixels: int = 4096) -> Tensor:
    """Subtract the median displacement of each frame and axis. (B, T, 2, H, W) px -> same.

    The median is that of the pixels of a regular grid with at most `max_pixels` points, which is faster.
    """
    step = math.ceil(math.sqrt(flow.shape[3] * flow.shape[4] / max_pixels))
    sample = flow[..., step // 2 :: step, step // 2 :: step].flatten(3)
    return flow - sample.median(dim=3).values[..., None, None]


def crop_resize_flip(x: Tensor, crop_boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop, resize and flip images. (B, C, T, H, W), (B, 5) -> (B, C, T, h, w).

    A crop of the output's size is copied exactly. Any other crop is sampled bilinearly, with pixel centers at half
    integers. `crop_boxes` belong on the CPU: their values decide, and a read from a GPU would wait for it.
    """
    h, w = size
    boxes = crop_boxes.float()
    rows = boxes.tolist()
    if all((top % 1, left % 1, height, width) == (0, 0, h, w) for top, left, height, width, _ in rows):
        crops = [
            clip[:, :, int(top) : int(top) + h, int(left) : int(left) + w]
            for clip, (top, left, *_) in zip(x, rows, strict=True)
        ]
        return torch.stack([crop.flip(3) if row[4] else crop for crop, row in zip(crops, rows, strict=True)])
    boxes = to_device(boxes, x.device)
    b, c, t, height, width = x.shape
    ys = boxes[:, 0, None] + (torch.arange(h, device=x.device) + 0.5) * boxes[:, 2, None] / h  # (B, h) in px
    xs = boxes[:, 1, None] + (torch.arange(w, device=x.device) + 0.5) * boxes[:, 3, None] / w
    xs = torch.where(boxes[:, 4, None].bool(), xs.flip(1), xs)
    grid = torch.stack(
        (
            (xs * 2 / width - 1)[:, None, :].expand(b, h, w),
            (ys * 2 / height - 1)[:, :, None].expand(b, h, w),
        ),
        dim=3,
    )
    flat = F.grid_sample(x.reshape(b, c * t, height, width).float(), grid, padding_mode="border", align_corners=False)
    return flat.view(b, c, t, h, w)


def transform_keypoints(
    joints: Tensor, crop_boxes: Tensor, size: tuple[int, int], *, flipped_joints: tuple[int, ...]
) -> Tensor:
    """Keypoints from stored-frame px to heat-map px; pixel centers are integers in both. (B, T, M, J, 3) -> same.

    `flipped_joints` gives for each joint the one that takes its channel after a horizontal flip.
    """
    boxes = to_device(crop_boxes.float(), joints.device)
    top, left, height, width, flip = (v[:, None, None, None] for v in boxes.unbind(1))
    x = (joints[..., 0] + 0.5 - left) / width * size[1] - 0.5
    y = (joints[..., 1] + 0.5 - top) / height * size[0] - 0.5
    x = torch.where(flip.bool(), size[1] - 1 - x, x)
    moved = torch.stack((x, y, joints[..., 2]), dim=-1)
    exchanged = moved.index_select(3, to_device(torch.tensor(flipped_joints), moved.device))
    return torch.where(flip[..., None].bool(), exchanged, moved)


def render_heatmaps(
    joints: Tensor, size: tuple[int, int], *, sigma: float, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Render every joint of every person. (B, T, M, J, 3) in heat-map px -> (B, J, T, h, w), normalized.

    The value is ``score * exp(-(dx^2 + dy^2) / (2 sigma^2))``, the maximum over persons, and exactly 0 if |dx| or |dy|
    exceeds 3 sigma: an infinite tail would dominate a per-patch normalized target. Joints that are not finite are
    absent.

    Only S pixels per axis around each joint are computed. All other pixels are the normalized zero. Normalization is
    monotonic, so the maximum is taken after it.
    """
    b, t, persons, channels, _ = joints.shape
    if persons == 0:
        raise ValueError("the clip has 0 persons; a reader must pad with persons of score 0")
    present = joints.isfinite().all(dim=-1)
    joints = torch.where(present[..., None], joints, 0.0)
    rows, ys = gaussian_1d(joints[..., 1], size[0], sigma)  # (B, T, M, J, S)
    columns, xs = gaussian_1d(joints[..., 0], size[1], sigma)
    rows = rows * joints[..., 2, None].clamp(min=0)
    means, stds = (to_device(torch.tensor(values), joints.device) for values in (mean, std))
    value = rows[..., :, None] * columns[..., None, :]  # (B, T, M, J, S, S)
    value.sub_(means[:, None, None]).div_(stds[:, None, None])
    image = (
        torch.arange(b, device=joints.device).view(-1, 1, 1, 1) * channels
        + torch.arange(channels, device=joints.device)
    ) * t + torch.arange(t, device=joints.device).view(-1, 1, 1)  # (B, T, 1, J): index of the image in the output
    pixel = ((image[..., None] * size[0] + ys) * size[1])[..., :, None] + xs[..., None, :]
    empty = (0 - means) / stds
    heat = empty.view(-1, 1, 1, 1).expand(b, channels, t, *size).contiguous()
    heat.view(-1).scatter_reduce_(0, pixel.flatten(), value.flatten(), "amax")
    return heat


def render_limbs(joints: Tensor, limbs: tuple[tuple[int, int], ...], size: tuple[int, int], *, sigma: float) -> Tensor:
    """Render lines between joints (PoseConv3D, arXiv 2104.13586). (B, T, M, J, 3) in heat-map px -> (B, L, T, h, w).

    The value is ``min(score of both joints) * exp(-d^2 / (2 sigma^2))``, where d is the distance of a pixel to the line
    segment. It is 0 beyond 3 sigma. It is the maximum over persons. A limb with a joint that is absent is absent.
    `limbs` are the positions of both joints of each limb.
    """
    present = joints.isfinite().all(dim=-1)
    joints = torch.where(present[..., None], joints, 0.0)
    ys = torch.arange(size[0], device=joints.device, dtype=joints.dtype)[:, None]
    xs = torch.arange(size[1], device=joints.device, dtype=joints.dtype)
    heat = []
    for limb in limbs:  # one at a time, to limit the memory
        start, end = (joints[..., k, :2, None, None].unbind(-3) for k in limb)  # x and y, (B, T, M, 1, 1)
        dx, dy = end[0] - start[0], end[1] - start[1]
        position = ((xs - start[0]) * dx + (ys - start[1]) * dy) / (dx**2 + dy**2).clamp(min=1e-12)
        position = position.clamp(0, 1)  # on the segment, of the point nearest to the pixel
        distance_2 = (xs - start[0] - position * dx) ** 2 + (ys - start[1] - position * dy) ** 2
        score = torch.minimum(*(joints[..., k, 2] for k in limb)).clamp(min=0)[..., None, None]
        value = score * torch.exp(-distance_2 / (2 * sigma**2))
        heat.append(torch.where(distance_2 <= (3 * sigma) ** 2, value, 0.0).amax(dim=2))
    return torch.stack(heat, dim=1)


def gaussian_1d(center: Tensor, length: int, sigma: float) -> tuple[Tensor, Tensor]:
    """A Gaussian along one axis around each center. (...) px -> values (..., S), int64 pixel indices (..., S).

    A value beyond 3 sigma or outside 0 to length - 1 is 0 at a valid index, so that it changes no maximum.
    """
    radius = math.floor(3 * sigma + 0.5)  # from the nearest pixel, which is up to half a pixel away from the center
    nearest = center.round().clamp(-radius - 1, length + radius)
    pixel = nearest[..., None] + torch.arange(-radius, radius + 1, device=center.device)
    distance = pixel - center[..., None]
    is_drawn = (distance.abs() <= 3 * sigma) & (pixel >= 0) & (pixel < length)
    value = torch.where(is_drawn, torch.exp(-(distance**2) / (2 * sigma**2)), 0.0)
    return value, pixel.clamp(0, length - 1).long()
