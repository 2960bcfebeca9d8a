"""Annotation formats. Importing this package registers the built-in ones."""

from mmdistill.data.annotations import f3set, mmcdfsl
from mmdistill.data.annotations.base import (
    ANNOTATION_READERS,
    AnnotationError,
    Event,
    Rally,
    annotation_reader,
    load_annotations,
)

__all__ = [
    "ANNOTATION_READERS",
    "AnnotationError",
    "Event",
    "Rally",
    "annotation_reader",
    "f3set",
    "load_annotations",
    "mmcdfsl",
]
