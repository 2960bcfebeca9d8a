"""Clips: frames, labels and limits of the video, for every anchor and sampling rate."""

import pickle
from itertools import pairwise

import numpy as np
import pytest

from mmdistill.data.annotations.base import Event, Player, Rally
from mmdistill.data.clips import (
    ClipSource,
    ClipSpec,
    ClipTable,
    build_index,
    clip_sources,
    count_overlapping_clips,
    select_clips,
)

A = "near_deuce_serve_-_-_T_-_in"
B = "far_ad_return_bh_gs_CC_-_in"


def rally(frames: int = 60, *events: tuple[int, str]) -> Rally:
    return Rally("r", frames, 25.0, tuple(Event(f, label) for f, label in events))


def test_event_is_at_the_center_or_start_of_its_clip() -> None:
    rallies = [rally(60, (20, A), (40, B))]
    center = build_index(rallies, ClipSpec("events", 8))
    assert [c.frames for c in center.clips] == [tuple(range(16, 24)), tuple(range(36, 44))]
    assert [center.classes[c.label] for c in center.clips] == [A, B]
    start = build_index(rallies, ClipSpec("events", 8, anchor="start", sampling_rate=2))
    assert start.clips[0].frames == tuple(range(20, 36, 2))
    assert len(build_index(rallies, ClipSpec("first", 8)).clips) == 1


@pytest.mark.parametrize("anchor", ["center", "start"])
@pytest.mark.parametrize("rate", [1, 3])
@pytest.mark.parametrize("frames", [24, 25, 60])
def test_clips_stay_in_the_video_without_its_last_frame(anchor: str, rate: int, frames: int) -> None:
    rallies = [rally(frames, *((f, A) for f in range(frames)))]
    index = build_index(rallies, ClipSpec("events", 8, sampling_rate=rate, anchor=anchor))
    assert len(index.clips) == frames
    for clip in index.clips:
        assert min(clip.frames) >= 0
        assert max(clip.frames) <= frames - 2
        assert len(clip.frames) == 8
        assert {b - a for a, b in pairwise(clip.frames)} == {rate}
    assert index.report["shifted_into_video"] > 0


def test_too_short_video_has_no_clip_and_is_listed() -> None:
    shortest = build_index([rally(9, (0, A))], ClipSpec("events", 8))
    assert shortest.clips[0].frames == tuple(range(8))
    short = build_index([rally(8, (0, A))], ClipSpec("events", 8))
    assert (list(short.clips), short.report["too_short"]) == ([], ["r"])


def test_windows_have_no_label_unless_the_video_is_the_class() -> None:
    rallies = [rally(40), Rally("q", 40, 25.0, ())]
    index = build_index(rallies, ClipSpec("windows", 8))
    assert [c.frames[0] for c in index.clips] == [0, 8, 16, 24] * 2  # 39 usable frames, the last window ends at 31
    assert {c.label for c in index.clips} == {-1}
    assert index.classes == ()
    by_video = build_index(rallies, ClipSpec("windows", 8, stride=4, label="video"))
    assert by_video.classes == ("q", "r")
    assert {by_video.classes[c.label] == c.video == c.group for c in by_video.clips} == {True}
    assert len({c.id for c in by_video.clips}) == len(by_video.clips) == 16


def test_two_events_in_one_frame_are_two_clips() -> None:
    index = build_index([rally(60, (20, A), (20, B))], ClipSpec("events", 8, label_fields=["type"]))
    assert index.classes == ("return", "serve")
    assert len({c.id for c in index.clips}) == 2


@pytest.mark.parametrize(
    "wrong",
    [{"clips": "all"}, {"anchor": "end"}, {"label": "x"}, {"num_frames": 0}, {"stride": 0}, {"label_fields": ["x"]}],
)
def test_error_names_the_invalid_argument(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(wrong)))):
        ClipSpec(**{"clips": "events", "num_frames": 8, **wrong})  # type: ignore[arg-type]


def test_overlapping_clips_of_one_class_are_counted() -> None:
    events = [(10, A), (15, B), (17, A), (30, A), (38, A)]
    clips = build_index([rally(60, *events)], ClipSpec("events", 8)).clips
    assert (
        count_overlapping_clips(clips) == 2
    )  # 10 and 17 share a frame; 15 is of another class; 30 and 38 are adjacent
    assert count_overlapping_clips(build_index([rally(60)], ClipSpec("windows", 8, stride=1)).clips) == 0  # no label


def test_a_window_costs_20_bytes() -> None:
    """The clips are rows of one array, and the names of the videos are stored once."""
    rallies = [Rally(f"r{i}", 266, 25.0, (Event(9, A),)) for i in range(40)]
    clips = build_index(rallies, ClipSpec("windows", 16, stride=1)).clips
    assert isinstance(clips, ClipTable)
    assert (len(clips), clips.rows.dtype, clips.rows.nbytes) == (10_000, np.int32, 200_000)
    assert len(pickle.dumps(clips)) < 21 * len(clips)
    assert (len(clips.videos), clips[-1].id, clips[251].frames) == (40, "r39:000249", tuple(range(1, 17)))


def test_a_video_that_occurs_twice_is_accepted_if_its_clips_differ() -> None:
    first, second = (Rally("r", 60, 25.0, (Event(frame, A),)) for frame in (20, 30))
    assert [c.id for c in build_index([first, second], ClipSpec("events", 8)).clips] == ["r#0@20", "r#0@30"]
    with pytest.raises(ValueError, match="two clips have the same id; list each video once"):
        build_index([first, first], ClipSpec("events", 8))


def test_selected_clips_are_stored_as_before() -> None:
    clips = build_index([rally(40), Rally("q", 40, 25.0, ())], ClipSpec("windows", 8)).clips
    selected = select_clips(clips, [1, 6])
    assert isinstance(selected, ClipTable)
    assert list(selected) == list(select_clips(tuple(clips), [1, 6])) == [clips[1], clips[6]]


def test_sources_have_the_player_of_the_event() -> None:
    """Two events at one frame, a video without a match in its name, and a label without a side of the court."""
    near, far = Player("Ana B", "LH"), Player("Eva D", "RH")
    events = (Event(20, A), Event(20, B), Event(30, "serve"))
    rallies = [Rally("open-f_100_160", 60, 25.0, events, near, far), Rally("own", 60, 25.0, (Event(20, A),))]
    index = build_index(rallies, ClipSpec("events", 8, label_fields=["0"]))
    assert clip_sources(index.clips, rallies) == (
        ClipSource("open-f", A, "Ana B", "LH"),
        ClipSource("open-f", B, "Eva D", "RH"),
        ClipSource("open-f", "serve"),
        ClipSource("own", A),
    )
    windows = build_index(rallies, ClipSpec("windows", 8, stride=30))
    assert set(clip_sources(windows.clips, rallies)) == {ClipSource("open-f"), ClipSource("own")}
