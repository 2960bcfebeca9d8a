"""Image files: JPEG, and PNG where a reader allows it."""

from collections.abc import Sequence

import cv2
import numpy as np

from mmdistill.data.readers.base import FrameError
from mmdistill.errors import format_count

_MARKERS = {"JPEG": (b"\xff\xd8", b"\xff\xd9"), "PNG": (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")}  # start, end
PADDING = b"\0\r\n "  # some encoders write it after the end marker


def image_format(data: bytes) -> str | None:
    """``JPEG`` or ``PNG``, by the first bytes of a file; None for others."""
    return next((name for name, (start, _) in _MARKERS.items() if data.startswith(start)), None)


def decode_image(path: str, data: bytes, formats: Sequence[str], flags: int) -> np.ndarray:
    """Decode the content of an image file. uint8 (H, W, 3), BGR, or as OpenCV's `flags` select.

    OpenCV decodes a truncated file to an image of full size with gray rows, so the end marker is checked first.

    Raises:
        FrameError: the file is empty, truncated, damaged or not in one of `formats`; names `path`.
    """
    if not data:
        raise FrameError(f"{path}: empty file")
    name = image_format(data)
    if name is None or name not in formats:
        raise FrameError(f"{path}: not a {' or '.join(formats)}")
    end = _MARKERS[name][1]
    if not data.endswith(end) and not data.rstrip(PADDING).endswith(end):
        raise FrameError(f"{path}: truncated {name} ({format_count(len(data), 'byte')}, no end marker)")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        raise FrameError(f"{path}: damaged {name}")
    return image
