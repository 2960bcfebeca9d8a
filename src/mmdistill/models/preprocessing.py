"""From raw clips to model inputs, on the device: crop, flip, resize, normalise, draw heat-maps.

A batch holds what the loader workers read: small raw samples and one `view` per clip. The same view is applied to
every modality, so that a joint, its pixel and its displacement stay at the same place.

Shapes: B batch, T frames, H x W stored frame, h x w model input, M persons, J = 17 joints.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdistill.modalities.base import ModalitySpec

# COCO-17: a horizontal flip exchanges left and right eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
FLIPPED_JOINTS: tuple[int, ...] = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)


def prepare(clip: Tensor, view: Tensor, spec: ModalitySpec, size: tuple[int, int]) -> Tensor:
    """The model input of one modality.

    Args:
        clip: rgb uint8 (B, T, H, W, 3); flow float (B, T, 2, H, W) in px; skeleton float (B, T, M, 17, 3), rows
            (x, y, score) in stored-frame px.
        view: (B, 5) float: top, left, height, width of the crop in stored-frame px, and 1 for a horizontal flip.
        spec: the modality.
        size: (h, w) of the model input, so the crop is seen at ``size * spec.scale``.

    Returns:
        (B, C, T, h, w) float32, normalised by the statistics of `spec`.
    """
    view = view.to(clip.device, torch.float32)
    if spec.name == "skeleton":
        return _heatmaps(_view_joints(clip.float(), view, size), spec, size)
    if spec.name == "flow":
        x = _view_pixels(clip.float().transpose(1, 2), view, size)
        zoom = (
            torch.tensor(size[::-1], device=x.device) / view[:, [3, 2]]
        )  # (B, 2): a displacement grows with the picture
        zoom[:, 0] *= 1 - 2 * view[:, 4]  # and its x turns round with a flip
        x = x * zoom[:, :, None, None, None]
    else:
        x = _view_pixels(clip.permute(0, 4, 1, 2, 3), view, size).float().div_(255)
    mean = torch.tensor(spec.mean, device=x.device).view(-1, 1, 1, 1)
    std = torch.tensor(spec.std, device=x.device).view(-1, 1, 1, 1)
    return x.sub_(mean).div_(std)  # in place: x is a fresh tensor here, and memory is what this costs


def _view_pixels(x: Tensor, view: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop, resize and flip pictures. (B, C, T, H, W) -> (B, C, T, h, w)

    Crops that need no resizing are cut out exactly, others are sampled bilinearly (pixel centres at halves).
    """
    h, w = size
    whole = view[:, :4].round().equal(view[:, :4])
    if whole and bool((view[:, 2] == h).all()) and bool((view[:, 3] == w).all()):
        cut = [
            clip[:, :, int(top) : int(top) + h, int(left) : int(left) + w]
            for clip, (top, left) in zip(x, view[:, :2].tolist(), strict=True)
        ]
        out = [c.flip(3) if flip else c for c, flip in zip(cut, view[:, 4].bool().tolist(), strict=True)]
        return torch.stack(out)
    b, c, t, height, width = x.shape
    ys = view[:, 0, None] + (torch.arange(h, device=x.device) + 0.5) * view[:, 2, None] / h  # (B, h) in px
    xs = view[:, 1, None] + (torch.arange(w, device=x.device) + 0.5) * view[:, 3, None] / w
    xs = torch.where(view[:, 4, None].bool(), xs.flip(1), xs)
    grid = torch.stack(
        (
            (xs * 2 / width - 1)[:, None, :].expand(b, h, w),
            (ys * 2 / height - 1)[:, :, None].expand(b, h, w),
        ),
        dim=3,
    )
    flat = F.grid_sample(x.reshape(b, c * t, height, width).float(), grid, padding_mode="border", align_corners=False)
    return flat.view(b, c, t, h, w)


def _view_joints(joints: Tensor, view: Tensor, size: tuple[int, int]) -> Tensor:
    """Joints from stored-frame px to heat-map px; pixel centres are whole numbers in both. (B, T, M, J, 3) -> same"""
    top, left, height, width, flip = (v[:, None, None, None] for v in view.unbind(1))
    x = (joints[..., 0] + 0.5 - left) / width * size[1] - 0.5
    y = (joints[..., 1] + 0.5 - top) / height * size[0] - 0.5
    x = torch.where(flip.bool(), size[1] - 1 - x, x)
    moved = torch.stack((x, y, joints[..., 2]), dim=-1)
    return torch.where(flip[..., None].bool(), moved[..., FLIPPED_JOINTS, :], moved)


def _heatmaps(joints: Tensor, spec: ModalitySpec, size: tuple[int, int]) -> Tensor:
    """Draw every joint of every person. (B, T, M, 17, 3) in heat-map px -> (B, 17, T, h, w), normalised

    ``score * exp(-(dx^2 + dy^2) / (2 sigma^2))``, the maximum over persons, and exactly 0 where |dx| or |dy| exceeds
    3 sigma: an infinite tail would dominate a per-patch normalised target. Joints that are not finite count as absent.

    Only the pixels around each joint are computed (S of them on each axis); all others are the normalised zero, which
    the picture is filled with. Normalising is monotonic, so the maximum may be taken after it.
    """
    b, t, persons, channels, _ = joints.shape
    if persons == 0:
        raise ValueError("a skeleton clip has no person axis entries; readers pad with score 0")
    present = joints.isfinite().all(dim=-1)
    joints = torch.where(present[..., None], joints, 0.0)
    rows, ys = _profile(joints[..., 1], size[0], spec.sigma)  # (B, T, M, 17, S)
    columns, xs = _profile(joints[..., 0], size[1], spec.sigma)
    rows = rows * joints[..., 2, None].clamp(min=0)
    mean = torch.tensor(spec.mean, device=joints.device)
    std = torch.tensor(spec.std, device=joints.device)
    value = rows[..., :, None] * columns[..., None, :]  # (B, T, M, 17, S, S)
    value.sub_(mean[:, None, None]).div_(std[:, None, None])
    picture = (
        torch.arange(b, device=joints.device).view(-1, 1, 1, 1) * channels
        + torch.arange(channels, device=joints.device)
    ) * t + torch.arange(t, device=joints.device).view(-1, 1, 1)  # (B, T, 1, 17): its number in the output
    place = ((picture[..., None] * size[0] + ys) * size[1])[..., :, None] + xs[..., None, :]
    empty = (0 - mean) / std
    heat = empty.view(-1, 1, 1, 1).expand(b, channels, t, *size).contiguous()
    heat.view(-1).scatter_reduce_(0, place.flatten(), value.flatten(), "amax")
    return heat


def _profile(centre: Tensor, length: int, sigma: float) -> tuple[Tensor, Tensor]:
    """A Gaussian along one axis, around each centre. (...) px -> values (..., S), their int64 pixel numbers (..., S)

    Beyond 3 sigma and outside 0 to length - 1 the value is 0, at a number inside: it changes no maximum.
    """
    reach = math.floor(3 * sigma + 0.5)  # from the nearest pixel, which is up to half a pixel away from the centre
    nearest = centre.round().clamp(-reach - 1, length + reach)
    at = nearest[..., None] + torch.arange(-reach, reach + 1, device=centre.device)
    distance = at - centre[..., None]
    drawn = (distance.abs() <= 3 * sigma) & (at >= 0) & (at < length)
    value = torch.where(drawn, torch.exp(-(distance**2) / (2 * sigma**2)), 0.0)
    return value, at.clamp(0, length - 1).long()
