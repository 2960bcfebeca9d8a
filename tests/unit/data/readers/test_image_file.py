"""Image files are read only if they are complete."""

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.image_file import decode_image, image_format


@pytest.mark.parametrize(("suffix", "name"), [(".jpg", "JPEG"), (".png", "PNG")])
def test_complete_images_are_read_and_truncated_ones_raise(suffix: str, name: str) -> None:
    data = cv2.imencode(suffix, np.full((16, 24), 7, np.uint8))[1].tobytes()
    assert image_format(data) == name
    image = decode_image("a.img", data + b"\r\n", ("JPEG", "PNG"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(image, np.full((16, 24), 7))
    other = "PNG" if name == "JPEG" else "JPEG"
    for content, message in ((data[:-4], f"truncated {name}"), (b"", "empty file"), (b"text", f"not a {name}")):
        with pytest.raises(FrameError, match=f"a.img: {message}"):
            decode_image("a.img", content, (name,), cv2.IMREAD_UNCHANGED)
    with pytest.raises(FrameError, match=f"not a {other}"):
        decode_image("a.img", data, (other,), cv2.IMREAD_COLOR)
