"""Images of frames on a page."""

import base64

import cv2
import numpy as np

from mmdistill.evaluation.report.frame_images import (
    MARK_COLOR,
    FrameStore,
    data_uri,
    encode_jpeg,
    encode_webp,
    film_strip,
    resize_to_width,
)

RED, BLUE = (np.full((30, 40, 3), color, np.uint8) for color in ((200, 0, 0), (0, 0, 200)))


def test_a_strip_shows_the_frames_in_order_and_marks_one():
    strip = film_strip([RED, BLUE, BLUE], marked=1)
    assert strip.shape == (34, 3 * 44, 3)
    middles = strip[17, [22, 66, 110]]
    assert middles.tolist() == [[200, 0, 0], [0, 0, 200], [0, 0, 200]]
    assert strip[17, [0, 43, 44, 87, 88, 131]].tolist() == [[255] * 3] * 2 + [list(MARK_COLOR)] * 2 + [[255] * 3] * 2


def test_a_strip_without_a_mark_has_white_borders():
    assert (film_strip([RED])[0] == 255).all()


def test_a_data_uri_is_the_jpeg_of_the_resized_frame():
    small = resize_to_width(RED, 20)
    assert small.shape == (15, 20, 3)
    uri = data_uri(encode_jpeg(small))
    content = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    shown = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.abs(shown.astype(int) - small).max() <= 4


def test_stored_frames_are_read_in_any_order():
    store = FrameStore()
    store.append(RED)
    store.append(BLUE)
    found = [store[frame].astype(int) for frame in (1, 0)]
    store.append(RED)  # after a read
    assert len(store) == 3
    for image, expected in zip([*found, store[2].astype(int)], (BLUE, RED, RED), strict=True):
        assert np.abs(image - expected).max() <= 4


def test_a_webp_image_has_the_colors_of_the_frame():
    content = np.frombuffer(encode_webp(BLUE), np.uint8)
    shown = cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1]
    assert bytes(content[8:12]) == b"WEBP"
    assert np.abs(shown.astype(int) - BLUE).max() <= 8
