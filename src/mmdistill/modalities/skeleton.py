"""Skeletons: one heat-map in [0, 1] per keypoint, rendered from keypoint files or stored."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.modalities.base import Modality, ModalitySpec, ReaderOptions
from mmdistill.modalities.keypoints import COCO17, KeypointLayout

if TYPE_CHECKING:
    from torch import Tensor

    from mmdistill.data.readers.base import Reader


class SkeletonModality(Modality):
    """Keypoints in one pickle or .npy file per video, or heat-maps in one .npy file per frame.

    Heat-maps of keypoints are rendered on the device.

    Args:
        name: name of the modality.
        keypoints: the default layout; the dataset config may set another one.
    """

    name = "skeleton"
    target = "pixel"
    input_stride = 4
    sigma = 0.6
    pattern_fields = ("video",)

    def __init__(self, name: str = name, keypoints: KeypointLayout = COCO17) -> None:
        self.name, self.keypoints, self.channels = name, keypoints, len(keypoints.channel_names)

    def open_reader(self, root: Path, options: ReaderOptions) -> "Reader":
        """A `HeatmapReader` if the options have the size of stored heat-maps, else a `SkeletonReader`."""
        from mmdistill.data.readers.heatmaps import HeatmapReader
        from mmdistill.data.readers.skeleton import ExtraKeypointReader, SkeletonReader

        o, files, extra = options, options.extra_keypoints, None
        if o.heatmap_size is not None:
            return HeatmapReader(root, **o.frame_files, size=o.heatmap_size, file_format=o.skeleton)
        if files is not None:
            extra = ExtraKeypointReader(
                files.root, frame_size=o.frame_size, max_persons=1, pattern=files.pattern, file_format=files.file_format
            )
        return SkeletonReader(
            root,
            frame_size=o.frame_size,
            max_persons=o.max_persons,
            pattern=o.pattern,
            file_format=o.skeleton,
            extra=extra,
        )

    def preprocess(self, clips: "Tensor", crop_boxes: "Tensor", spec: ModalitySpec, size: tuple[int, int]) -> "Tensor":
        """Keypoints or stored heat-maps -> float32 (B, C, T, h, w).

        `clips` are keypoints (B, T, M, J, 3), rows (x, y, score) in stored-frame px, or with ``spec.heatmaps``
        heat-maps (B, T, J, h', w') in [0, 1]. A horizontal flip also exchanges the keypoints of each pair.
        """
        import torch

        from mmdistill.models.preprocessing import (
            crop_resize_flip,
            normalize,
            render_heatmaps,
            render_limbs,
            to_device,
            transform_keypoints,
        )

        layout = spec.keypoints
        if layout is None:
            raise ValueError(f"{spec.name}: keypoints is not set")
        if spec.heatmaps is not None:
            boxes = spec.heatmaps.scale_boxes(crop_boxes)
            x = crop_resize_flip(clips.float().transpose(1, 2), boxes, size)
            flip = to_device(boxes[:, 4].bool(), x.device).view(-1, 1, 1, 1, 1)
            exchanged = x.index_select(1, to_device(torch.tensor(layout.flipped), x.device))
            return normalize(torch.where(flip, exchanged, x), spec.mean, spec.std)
        joints = transform_keypoints(clips.float(), crop_boxes, size, flipped_joints=layout.flipped)
        if spec.sigma is None:
            raise ValueError(f"{spec.name}: sigma is not set")
        count = len(layout.names)
        heat = render_heatmaps(joints, size, sigma=spec.sigma, mean=spec.mean[:count], std=spec.std[:count])
        if not layout.limb_channels:
            return heat
        limbs = render_limbs(joints, layout.limb_positions, size, sigma=spec.sigma)
        return torch.cat((heat, normalize(limbs, spec.mean[count:], spec.std[count:])), dim=1)
