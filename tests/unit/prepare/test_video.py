"""Decoding of videos: every frame once, truncated files detected, frame rates from timestamps."""

from pathlib import Path

import pytest

from mmdistill.prepare.video import (
    VideoError,
    container_frame_count,
    decode_frames,
    find_repeated_frames,
    find_videos,
    mean_frame_rate,
)
from tests.generated_video import BroadcastClip, write_moving_square


def test_every_frame_is_decoded_once_with_its_timestamp(broadcast: BroadcastClip) -> None:
    frames = list(decode_frames(broadcast.path))
    assert [f.number for f in frames] == list(range(broadcast.num_frames))
    assert container_frame_count(broadcast.path) == broadcast.num_frames
    assert [f.seconds for f in frames] == pytest.approx([k / 30 for k in range(broadcast.num_frames)], abs=1e-3)
    assert all(f.pixels.shape == (720, 1280, 3) for f in frames)


def test_truncated_video_is_rejected_after_its_last_frame(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"a\.avi: truncated or broken, it ends after frame \d+, .*declares 20 frames"):
        list(decode_frames(video))


def test_file_that_is_no_video_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "d.mp4").write_bytes(b"no video")
    with pytest.raises(VideoError, match=r"d\.mp4: OpenCV cannot open it as a video"):
        list(decode_frames(tmp_path / "d.mp4"))
    assert container_frame_count(tmp_path / "d.mp4") == 0


def test_frame_rate_is_the_mean_over_all_timestamps() -> None:
    assert mean_frame_rate([0.0, 0.04, 0.08]) == pytest.approx(25)
    assert mean_frame_rate([0.0, 0.04, 0.16]) == pytest.approx(12.5)
    assert mean_frame_rate([0.0]) == 0


def test_videos_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.MP4").touch()
    (tmp_path / "b.mkv").touch()
    (tmp_path / "note.txt").touch()
    assert sorted(find_videos(tmp_path)) == ["a", "b"]
    (tmp_path / "a.avi").touch()
    with pytest.raises(VideoError, match="have the same name"):
        find_videos(tmp_path)
    with pytest.raises(VideoError, match="no such file or folder"):
        find_videos(tmp_path / "nothing")


def test_repeated_frames_are_found() -> None:
    """25 fps content stored at 30 fps repeats every sixth frame."""
    differences = [0.3 + 0.02 * (k % 4) for k in range(24)]
    for k in (5, 11, 17, 23):
        differences[k] = 0.01
    assert find_repeated_frames(differences) == [6, 12, 18, 24]
    assert find_repeated_frames([0.3] * 10) == []
    assert find_repeated_frames([0.0] * 10) == []
