"""Rallies of a match: names, frame rates, and the temporary file of their frames."""

from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Rally
from mmdistill.prepare.rallies import FrameSpool, RallySpan, check_frame_rate, spans_by_match
from mmdistill.prepare.video import VideoError

FILE = Path("val.json")


def test_rallies_are_grouped_by_match_and_sorted(caplog: pytest.LogCaptureFixture) -> None:
    names = {"2014-M_W-F-A_B-C_30_50": 20, "2014-M_W-F-A_B-C_5_45": 40, "x_0_7": 7}
    rallies = [Rally(name, count, 29.0, ()) for name, count in names.items()]
    videos = {name: Path(f"{name}.mkv") for name in ("2014-M_W-F-A_B-C", "x", "other")}
    spans = spans_by_match(rallies, videos, FILE)
    assert {match: [(s.start, s.stop, s.fps) for s in found] for match, found in spans.items()} == {
        "2014-M_W-F-A_B-C": [(5, 45, 29.0), (30, 50, 29.0)],
        "x": [(0, 7, 29.0)],
    }
    assert [record.message for record in caplog.records] == ["val.json: no rally of 1 video, skipping other"]


def test_all_matches_without_a_video_are_named() -> None:
    rallies = [Rally(f"{match}_0_5", 5, 25.0, ()) for match in ("b", "Wimbledon_F", "a")]
    videos = {"b": Path("b.mp4"), "Wimbledon-F": Path("Wimbledon-F.mp4")}
    with pytest.raises(
        VideoError, match=r"(?s)val\.json: 2 matches without a video.*\n  Wimbledon_F; did you mean "
    ) as e:
        spans_by_match(rallies, videos, FILE)
    assert str(e.value).endswith("did you mean Wimbledon-F?\n  a")


def test_wrong_name_and_length_are_named() -> None:
    rallies = [Rally("clip", 5, 25.0, ()), Rally("m_10_20", 11, 25.0, ()), Rally("m_0_5", 5, 25.0, ())]
    with pytest.raises(AnnotationError, match="2 rallies cannot be cut out of a match: clip: the name is not") as error:
        spans_by_match(rallies, {"m": Path("m.mp4")}, FILE)
    assert "m_10_20: num_frames=11 is not END - START = 10" in str(error.value)


@pytest.mark.parametrize(
    ("annotated", "rates", "is_accepted"),
    [
        (29.0, [29.97], True),  # F3Set truncates frame rates
        (23.0, [23.976], True),
        (30.0, [29.97], True),
        (25.0, [25.02], True),
        (59.0, [59.94], True),
        (29.97, [30.0], True),
        (UNKNOWN_FPS, [12.0], True),
        (25.0, [0.0], True),  # a folder of JPEGs
        (12.0, [29.5, 12.0], True),  # the mean over the timestamps differs from the declared rate
        (29.5, [29.5, 12.0], True),
        (29.0, [30.0], False),
        (25.0, [24.0], False),
        (29.0, [59.94], False),
        (25.0, [50.0], False),
        (25.0, [29.5, 12.0], False),
    ],
)
def test_frame_rate_is_compared(annotated: float, rates: list[float], is_accepted: bool) -> None:
    spans = [RallySpan("m_0_5", 0, 5, annotated)]
    if is_accepted:
        check_frame_rate(Path("m.mp4"), spans, *rates)
        return
    with pytest.raises(VideoError, match=rf"m\.mp4: has {rates[-1]:.2f} fps, but .* annotated at {annotated:g} fps"):
        check_frame_rate(Path("m.mp4"), spans, *rates)


def test_spooled_frames_are_equal_in_each_pass(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    spool = FrameSpool(tmp_path / "a.raw")
    for image in images:
        spool.add(image)
    for _ in range(2):
        np.testing.assert_array_equal([frame.pixels for frame in spool.read()], images)
    spool.remove()
    assert not list(tmp_path.iterdir())
