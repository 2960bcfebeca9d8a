"""Pictures of clips: their rows, their frames, and the order in which clips get one."""

import base64
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.builders import make_clip_dataset
from mmdistill.config import modality_specs
from mmdistill.data.clips import Clip
from mmdistill.evaluation.clip_pictures import ClipPictures, choose_frames, picture_order
from mmdistill.evaluation.report.frame_images import MARK_COLOR
from tests.browse_data import browse_config


@pytest.fixture(scope="module")
def pictures(tiny_clips: Path) -> ClipPictures:
    data = browse_config(tiny_clips).data_module
    dataset = make_clip_dataset(data, ("rgb", "flow", "skeleton"), training=False, seed=0, masked=True)
    return ClipPictures(dataset, modality_specs(data))


def decode(uri: str) -> np.ndarray:
    content = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1].astype(int)


def test_rows_are_input_flow_joints_and_mask(pictures: ClipPictures) -> None:
    """The tiny data: a square of +-3 px and a joint at its center, which move to the right; the frame has 32 px."""
    assert pictures.rows == ("input", "flow", "skeleton", "mask")
    image = decode(pictures.draw(0))
    cell = 116  # 112 px and the border
    assert image.shape == (4 * cell, 4 * cell, 3)
    rows = [image[k * cell : (k + 1) * cell, 2 * cell : 3 * cell] for k in range(4)]  # the frame of the event
    square = slice(58 - 8, 58 + 8)
    plain, flow, joints, mask = (row[square, 50:64].mean(axis=(0, 1)) for row in rows)
    assert plain.min() > 200  # bright
    assert flow[0] > 200 > 120 > flow[1]  # red: to the right
    assert joints[0] > 200 > 120 > joints[2]  # yellow
    assert mask.max() > 100
    gray = np.abs(rows[3] - 128).max(axis=2) < 12
    assert gray[4:-4, 4:-4].mean() == pytest.approx(0.75, abs=0.03)  # mask_ratio
    np.testing.assert_allclose(rows[0][0, 20:90].mean(axis=0), MARK_COLOR, atol=30)
    assert decode(pictures.draw(0, only_input=True)).shape == (cell, 4 * cell, 3)


def test_chosen_frames_contain_the_event() -> None:
    clip = Clip("a", "v", tuple(range(10, 26)), 0, "v")
    assert choose_frames(clip, 18) == [0, 5, 8, 15]
    assert choose_frames(clip, 99) == [0, 5, 10, 15]
    assert choose_frames(Clip("a", "v", (3, 5), 0, "v"), 5) == [0, 1]


def test_each_label_gets_a_picture_before_any_gets_two() -> None:
    labels = [0] * 5 + [1] * 2 + [2] * 3 + [-1]
    order = picture_order(labels, seed=0)
    assert sorted(order) == list(range(len(labels)))
    assert [labels[i] for i in order[:4]] == [0, 2, 1, -1]  # the most frequent label first
    counts = Counter(labels[i] for i in order[:7])
    assert counts == {0: 2, 1: 2, 2: 2, -1: 1}
    assert order != picture_order(labels, seed=1)
