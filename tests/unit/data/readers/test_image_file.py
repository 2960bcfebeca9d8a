"""Image files are read only if they are complete."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.image_file import image_format, read_image


@pytest.mark.parametrize(("suffix", "name"), [(".jpg", "JPEG"), (".png", "PNG")])
def test_complete_images_are_read_and_truncated_ones_raise(tmp_path: Path, suffix: str, name: str) -> None:
    data = cv2.imencode(suffix, np.full((16, 24), 7, np.uint8))[1].tobytes()
    path = tmp_path / "image"
    path.write_bytes(data + b"\r\n")
    assert image_format(data) == name
    image = read_image(str(path), "flow", ("JPEG", "PNG"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(image, np.full((16, 24), 7))
    other = "PNG" if name == "JPEG" else "JPEG"
    for content, message in ((data[:-4], f"truncated {name}"), (b"", "empty file"), (b"text", f"not a {name}")):
        path.write_bytes(content)
        with pytest.raises(FrameError, match=message):
            read_image(str(path), "flow", (name,), cv2.IMREAD_UNCHANGED)
    path.write_bytes(data)
    with pytest.raises(FrameError, match=f"not a {other}"):
        read_image(str(path), "rgb", (other,), cv2.IMREAD_COLOR)
