"""Annotation formats. Importing this package registers the built-in ones."""

from mmdistill.data.annotations import f3set, mmcdfsl
from mmdistill.data.annotations.base import (
    ANNOTATION_FORMATS,
    AnnotationError,
    Event,
    Rally,
    load_annotations,
    register_annotation_format,
)

__all__ = [
    "ANNOTATION_FORMATS", "AnnotationError", "Event", "Rally", "f3set", "load_annotations", "mmcdfsl",
    "register_annotation_format",
]  # fmt: skip
