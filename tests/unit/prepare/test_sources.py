"""Sources of frames: video files and folders of numbered JPEGs, found by name, at any frame rate."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.prepare.sources import decode_frames, find_videos, fingerprint, list_frames, read_frames, read_header
from mmdistill.prepare.video import VideoError
from tests.generated_video import gray_images, write_frame_folder, write_video


@pytest.mark.parametrize(
    ("times_ms", "fps", "count"),
    [
        ([40 * k for k in range(10)], 25, 10),
        ([40 * k for k in range(10)], 12.5, 5),
        ([40 * k for k in range(4)], 50, 7),
        ([0, 40, 80, 400, 440], 25, 12),
    ],
)
def test_frames_at_another_rate_are_the_nearest_ones(
    tmp_path: Path, times_ms: list[int], fps: float, count: int
) -> None:
    path = write_video(tmp_path / "v.mp4", gray_images(len(times_ms)), times_ms=times_ms)
    frames = list(read_frames(path, fps))
    assert [f.number for f in frames] == list(range(count))
    assert [f.seconds for f in frames] == pytest.approx([k / fps for k in range(count)])
    for frame in frames:
        distances = [abs(frame.seconds - ms / 1000) for ms in times_ms]
        assert distances[round(float(frame.pixels.mean()) / 20)] == pytest.approx(min(distances), abs=1e-3)


def test_linked_folders_are_followed_once_and_skipped_files_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "disk").mkdir()
    names = ["rally.mp4", "camcorder.MTS", "phone.3gp", "old.wmv", "disc.m2ts", "web.flv", "VTS_01_1.VOB", "cam.mts2"]
    for name in (*names, "._rally.mp4", "notes.txt", "rally.srt"):
        (tmp_path / "disk" / name).touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "loop").symlink_to(tmp_path / "videos")
    assert sorted(find_videos(tmp_path / "videos")) == sorted(Path(name).stem for name in names)
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'videos'}: skipping 1 file of macOS (._rally.mp4)",
        f"{tmp_path / 'videos'}: skipping 2 files without the suffix of a video (notes.txt, rally.srt)",
    ]


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


def test_folders_of_numbered_jpegs_are_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = gray_images(2)
    write_frame_folder(tmp_path / "m_0_2", images)
    write_frame_folder(tmp_path / "P01/P01_01", images, first=1, pattern="frame_{:010d}.jpg")
    write_frame_folder(tmp_path / "photos", images, pattern="{}.JPEG")
    (tmp_path / "photos/cover.jpg").touch()
    for axis in "xy":
        write_frame_folder(tmp_path / axis, images, pattern=f"flow_{axis}_{{}}.jpg")
        (tmp_path / axis / f"flow_{axis}_0.jpg").rename(tmp_path / "m_0_2" / f"{axis}.txt")
    (tmp_path / "videos").mkdir()
    for name in ("1.jpg", "2.jpg", "a.mp4"):
        (tmp_path / "videos" / name).touch()
    assert find_videos(tmp_path) == {
        "P01/P01_01": tmp_path / "P01/P01_01",
        "m_0_2": tmp_path / "m_0_2",
        "a": tmp_path / "videos/a.mp4",
    }
    assert "skipping 7 files without the suffix of a video" in caplog.text
    assert find_videos(tmp_path / "m_0_2") == {"m_0_2": tmp_path / "m_0_2"}


def test_outputs_of_an_earlier_preparation_are_not_found(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "out/.prepared").mkdir(parents=True)
    write_frame_folder(tmp_path / "out/vid_frames_224/a", gray_images(2))
    write_frame_folder(tmp_path / "out/contact_sheets", gray_images(2))
    assert find_videos(tmp_path) == {"a": tmp_path / "a.mp4"}
    assert list(find_videos(tmp_path / "out/vid_frames_224")) == ["a"]


@pytest.mark.parametrize("first", [0, 1])
def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path, first: int) -> None:
    folder = write_frame_folder(tmp_path / "a", gray_images(12), first=first, pattern="img_{}.jpg")
    (folder / "._img_3.jpg").touch()
    frames = list(read_frames(folder))
    assert [frame.number for frame in frames] == list(range(12))
    assert [round(float(frame.pixels.mean()) / 20) for frame in frames] == list(range(12))
    assert frames[3].jpeg == (folder / f"img_{3 + first}.jpg").read_bytes()
    assert [frame.pixels.size > 0 for frame in decode_frames(folder, {2, 5}.__contains__)].count(True) == 2
    header = read_header(folder)
    assert (header.frames, header.frame_size, header.fps) == (12, (64, 96), 0)
    with pytest.raises(VideoError, match="a folder of JPEGs has no timestamps; omit --fps"):
        next(read_frames(folder, 25.0))


def test_incomplete_folder_is_named(tmp_path: Path) -> None:
    folder = write_frame_folder(tmp_path / "a", gray_images(6))
    before = fingerprint(folder)
    (folder / "000003.jpg").rename(folder / "000006.jpg")
    with pytest.raises(VideoError, match=r"a: 1 frame missing \(3\), the numbers begin at 0 or 1 and end at 6; copy"):
        list_frames(folder)
    (folder / "000006.jpg").rename(folder / "000003.jpg")
    assert fingerprint(folder) == before
    (folder / "3.jpg").write_bytes(b"")
    with pytest.raises(VideoError, match=r"000003\.jpg and 3\.jpg have the same number"):
        list_frames(folder)
    (folder / "3.jpg").unlink()
    data = (folder / "000004.jpg").read_bytes()
    (folder / "000004.jpg").write_bytes(data[: len(data) // 2])
    assert fingerprint(folder) != before
    with pytest.raises(FrameError, match=r"000004\.jpg: truncated JPEG"):
        list(read_frames(folder))
    cv2.imwrite(str(folder / "000004.jpg"), np.zeros((32, 96, 3), np.uint8))
    with pytest.raises(VideoError, match=r"000004\.jpg: the frame size changes at frame 4"):
        list(read_frames(folder))
