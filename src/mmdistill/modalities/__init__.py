"""Modalities: rgb, flow, skeleton, and all that other distributions register."""

from mmdistill.modalities.base import (
    MODALITIES,
    ExtraKeypointFiles,
    Modality,
    ModalitySpec,
    ReaderOptions,
    StoredHeatmaps,
    get_modality,
    modality_names,
    preprocess_clips,
    register_modality,
    stored_joints,
    stored_statistics,
)
from mmdistill.modalities.flow import FlowModality
from mmdistill.modalities.keypoints import COCO17, KEYPOINT_LAYOUTS, KeypointLayout
from mmdistill.modalities.rgb import RgbModality
from mmdistill.modalities.skeleton import SkeletonModality

STUDENT_MODALITY = RgbModality.name  # the student sees RGB only
BUILTIN_MODALITIES = (RgbModality.name, FlowModality.name, SkeletonModality.name)

for _modality in (RgbModality(), FlowModality(), SkeletonModality()):
    register_modality(_modality)

__all__ = [
    "BUILTIN_MODALITIES",
    "COCO17",
    "KEYPOINT_LAYOUTS",
    "MODALITIES",
    "STUDENT_MODALITY",
    "ExtraKeypointFiles",
    "KeypointLayout",
    "Modality",
    "ModalitySpec",
    "ReaderOptions",
    "StoredHeatmaps",
    "get_modality",
    "modality_names",
    "preprocess_clips",
    "register_modality",
    "stored_joints",
    "stored_statistics",
]
