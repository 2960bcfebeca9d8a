"""Player tracking on real broadcast clips, which only some machines have."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mmdistill.prepare.player_tracking import find_players
from mmdistill.prepare.video import decode_frames
from tests.commands import ROOT
from tests.generated_video import write_pan
from tests.unit.prepare.test_player_tracking import box_centers, pan_offsets


@pytest.fixture(scope="module")
def real_broadcasts() -> Path:
    """The folder of the clips."""
    folder = ROOT.parent / "shared" / "data" / "tennis-video"
    if not folder.exists():
        pytest.skip("the real broadcast clips are not next to this repository")
    return folder


def test_server_of_a_real_broadcast_is_found(real_broadcasts: Path) -> None:
    near, far = find_players(partial(decode_frames, real_broadcasts / "clip3.mp4"), split=0.4).boxes
    assert (~np.isnan(near[:, 0])).mean() > 0.9
    x, y = box_centers(near)[45].tolist()
    assert 950 < x < 1170  # position of the server in frame 45, read off the image
    assert 580 < y < 820
    x, y = box_centers(far)[45].tolist()
    assert 660 < x < 760
    assert 120 < y < 240


def test_players_of_a_real_broadcast_are_found_under_a_moving_camera(real_broadcasts: Path, tmp_path: Path) -> None:
    pan = pan_offsets(93, (240, 30), (19, 32))
    video = write_pan(tmp_path / "pan.mp4", real_broadcasts / "clip3.mp4", pan, (864, 1440), shrink=2)
    found = find_players(partial(decode_frames, video), split=0.47).boxes
    assert (~np.isnan(found[..., 0])).mean(axis=1).min() > 0.75
    (near_x, near_y), (far_x, far_y) = (2 * box_centers(boxes)[45] + pan[45] for boxes in found)
    assert 950 < near_x < 1170  # the positions of test_server_of_a_real_broadcast_is_found
    assert 580 < near_y < 820
    assert 660 < far_x < 760
    assert 120 < far_y < 240
