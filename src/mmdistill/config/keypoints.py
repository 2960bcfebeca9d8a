"""The keys of keypoint modalities: the layout of the model input, and the format of the files."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmdistill.config.rules import ConfigError
from mmdistill.config.schema import DataModuleConfig, ModalityConfig
from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.modalities import COCO17, KEYPOINT_LAYOUTS, KeypointLayout, get_modality


def keypoint_layout(data: DataModuleConfig, modality: str) -> KeypointLayout | None:
    """The keypoints of a modality, the extra ones last; None for a modality without keypoints.

    Raises:
        ConfigError: a value is not allowed, or a key of keypoints is set for a modality without them.
    """
    key, layout = f"data_module.modalities.{modality}", get_modality(modality).keypoints
    settings = data.modalities.get(modality)
    if settings is None:
        return layout
    _validate_keys(settings, key, has_keypoints=layout is not None)
    if layout is None:
        return None
    if settings.joints is not None:
        layout = _read_joints(settings.joints, f"{key}.joints")
    extra = settings.extra_keypoints
    try:
        layout = layout.with_more(tuple(extra.names), tuple(map(tuple, extra.pairs)))
        return replace(layout, limb_channels=True) if settings.limb_channels else layout
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _validate_keys(settings: ModalityConfig, key: str, *, has_keypoints: bool) -> None:
    """Raise if a key of keypoints is set for a modality without them, or together with one that excludes it."""
    extra, size = settings.extra_keypoints, settings.heatmap_size
    values = {"joints": settings.joints, "limb_channels": settings.limb_channels, "heatmap_size": size}
    given = [name for name, value in {**values, "extra_keypoints.names": extra.names}.items() if value]
    if given and not has_keypoints:
        raise ConfigError(f"{key}.{given[0]}: this modality has no keypoints; remove the key")
    if bool(extra.names) != (extra.dir is not None):
        raise ConfigError(
            f"{key}.extra_keypoints: names={extra.names} and dir={extra.dir}; set both, or none for no extra keypoints"
        )
    if size is None:
        return
    if len(size) != 2:
        raise ConfigError(f"{key}.heatmap_size={size} must be [height, width] in px")
    excluded = [name for name in given if name in ("limb_channels", "extra_keypoints.names")]
    excluded += [] if settings.sigma is None else ["sigma"]
    if excluded:
        raise ConfigError(
            f"{key}.{excluded[0]} needs keypoint files, but {key}.heatmap_size is set; remove one of them"
        )


def _read_joints(value: Any, key: str) -> KeypointLayout:
    """A layout by its name, or from a mapping with names, pairs and limbs."""
    if isinstance(value, str) and value in KEYPOINT_LAYOUTS:
        return KEYPOINT_LAYOUTS[value]
    expected = f"{', '.join(KEYPOINT_LAYOUTS)}, or a mapping with a list of names, and lists of pairs and limbs"
    if not isinstance(value, dict) or set(value) - {"names", "pairs", "limbs"}:
        raise ConfigError(f"{key}={value} is not one of {expected}")
    names, pairs, limbs = (value.get(part) or [] for part in ("names", "pairs", "limbs"))
    try:
        if not names or isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError
        return KeypointLayout(tuple(names), tuple(map(tuple, pairs)), tuple(map(tuple, limbs)))
    except TypeError:
        raise ConfigError(f"{key}={value} is not one of {expected}") from None
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def skeleton_format(data: DataModuleConfig, modality: str = "skeleton") -> SkeletonFormat:
    """How the keypoint or heat-map files of a modality are stored. Raises `ConfigError` if a value is not allowed."""
    layout, extra = keypoint_layout(data, modality), extra_format(data, modality)
    assert layout is not None
    settings = data.modalities.get(modality)
    num_joints = len(layout.names) - (extra.num_joints if extra else 0)
    is_coco = layout.names[:num_joints] == COCO17.names
    if modality == "skeleton" and settings is not None and settings.heatmap_size is not None:
        for name in ("skeleton_joints", "skeleton_img_shape"):
            if getattr(data, name) is not None:
                raise ConfigError(
                    f"data_module.{name} is for keypoint files, but data_module.modalities.{modality}.heatmap_size is "
                    "set; remove one of them"
                )
    joints = data.skeleton_joints if modality == "skeleton" else None
    if isinstance(joints, str) and not is_coco:
        raise ConfigError(
            f"data_module.skeleton_joints={joints} is for the joints coco17, and modalities.{modality}.joints has "
            "others; set skeleton_joints=null, or a list of their positions in the files"
        )
    img_shape = _image_shape(data.skeleton_img_shape, "data_module.skeleton_img_shape")
    try:
        joints = "coco17" if joints is None and is_coco else joints
        return SkeletonFormat(joints, img_shape, data.skeleton_score_max, num_joints)
    except ValueError as error:
        raise ConfigError(f"data_module.{error}") from error


def extra_format(data: DataModuleConfig, modality: str) -> SkeletonFormat | None:
    """How the files of the extra keypoints of a modality are stored; None without extra keypoints."""
    extra = data.modalities[modality].extra_keypoints if modality in data.modalities else None
    if extra is None or not extra.names:
        return None
    key = f"data_module.modalities.{modality}.extra_keypoints."
    img_shape = _image_shape(extra.img_shape, f"{key}img_shape")
    return SkeletonFormat(None, img_shape, extra.score_max, len(extra.names), key)


def validate_keypoint_files(settings: ModalityConfig, modality: str) -> tuple[str, ...]:
    """The fields of a file name of a keypoint modality: of one file per video, or per frame.

    Raises:
        ConfigError: a file name has ``{frame}``, but there is one file per video.
    """
    key, extra = f"data_module.modalities.{modality}", settings.extra_keypoints
    if settings.heatmap_size is not None:
        return ("video", "frame")
    if settings.pattern is not None and "{frame" in settings.pattern:
        raise ConfigError(
            f"{key}.pattern={settings.pattern!r} has {{frame}}, but there is one keypoint file per video; if the files "
            f"are heat-maps, set {key}.heatmap_size"
        )
    if extra.names and ("{video" not in extra.pattern or "{frame" in extra.pattern):
        raise ConfigError(
            f"{key}.extra_keypoints.pattern={extra.pattern!r} must contain {{video}} and not {{frame}}: there is one "
            "file per video"
        )
    return ("video",)


def _image_shape(size: Sequence[int] | None, key: str) -> tuple[int, int] | None:
    if size is not None and len(size) != 2:
        raise ConfigError(f"{key}={list(size)} must be [height, width] in px")
    return None if size is None else (size[0], size[1])
