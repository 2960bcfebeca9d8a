"""Decoding of videos: every frame once, truncated files detected, frame rates from timestamps."""

import itertools
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from mmdistill.prepare.video import (
    Header,
    VideoError,
    decode_frames,
    find_repeated_frames,
    mean_frame_rate,
    read_header,
)
from tests.generated_video import BroadcastClip, gray_images, write_moving_square, write_video


def test_every_frame_is_decoded_once_with_its_timestamp(broadcast: BroadcastClip) -> None:
    frames = list(decode_frames(broadcast.path))
    assert [f.number for f in frames] == list(range(broadcast.num_frames))
    assert read_header(broadcast.path).frames == broadcast.num_frames
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
    with pytest.raises(VideoError, match=r"d\.mp4: not a video that FFmpeg can decode \([^/]*\); copy it again, or"):
        list(decode_frames(tmp_path / "d.mp4"))
    assert read_header(tmp_path / "d.mp4") == Header()


def gray_levels(path: Path) -> list[int]:
    """The number of the image of `gray_images` that each decoded frame shows."""
    return [round(float(frame.pixels.mean()) / 20) for frame in decode_frames(path)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
def test_variable_frame_rate_has_the_timestamps_of_presentation(tmp_path: Path, suffix: str) -> None:
    times_ms = [0, 40, 80, 200, 240, 600, 640, 680, 720, 1000, 1040, 2000]
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = write_video(tmp_path / f"vfr{suffix}", gray_images(12), times_ms=times_ms, codec=codec)
    assert [f.seconds for f in decode_frames(path)] == pytest.approx([ms / 1000 for ms in times_ms], abs=1e-4)
    assert gray_levels(path) == list(range(12))


@pytest.mark.parametrize(("suffix", "is_estimate"), [(".mp4", False), (".mkv", True), (".webm", True)])
def test_frame_count_of_a_container_without_one_is_an_estimate(tmp_path: Path, suffix: str, is_estimate: bool) -> None:
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = write_video(tmp_path / f"v{suffix}", gray_images(12), codec=codec)
    header = read_header(path)
    assert header.is_estimate == is_estimate
    assert abs(header.frames - 12) <= 1


def test_edit_list_cuts_the_frames_before_time_zero(tmp_path: Path) -> None:
    """A start at -120 ms is stored as an edit list. The container still declares the three frames that it cuts off."""
    path = write_video(tmp_path / "cut.mp4", gray_images(12), times_ms=[40 * k - 120 for k in range(12)])
    assert read_header(path).frames == 12
    assert gray_levels(path) == list(range(3, 12))
    assert [f.seconds for f in decode_frames(path)] == pytest.approx([0.04 * k for k in range(9)])


def test_seconds_count_from_the_first_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mp4", gray_images(12), times_ms=[40 * k + 400 for k in range(12)])
    assert [f.seconds for f in decode_frames(path)] == pytest.approx([0.04 * k for k in range(12)])


def quadrant_image() -> np.ndarray:
    """A gray image with a white rectangle in its top left quarter."""
    image = np.full((64, 96, 3), 40, np.uint8)
    image[8:24, 8:40] = 250
    return image


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_of_the_file_is_applied(tmp_path: Path, degrees: int) -> None:
    path = write_video(tmp_path / "r.mp4", [quadrant_image()] * 3, setup=lambda s: s.set_display_rotation(degrees))
    second = cv2.VideoCapture(str(path))  # another implementation, which rotates too
    for frame in decode_frames(path):
        expected = np.rot90(quadrant_image(), degrees // 90)  # counterclockwise
        assert frame.pixels.shape == expected.shape
        assert np.abs(frame.pixels.astype(int) - expected).mean() < 4
        np.testing.assert_allclose(frame.pixels, second.read()[1], atol=4)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 128), (Fraction(1, 2), 48)])
def test_pixels_become_square(tmp_path: Path, aspect: Fraction, width: int) -> None:
    def set_aspect(stream: VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    path = write_video(tmp_path / "s.mp4", [quadrant_image()] * 3, setup=set_aspect)
    for frame in decode_frames(path):
        assert frame.pixels.shape == (64, width, 3)
        columns = np.flatnonzero(frame.pixels[16, :, 0] > 145)  # 8 to 39 before
        assert columns[[0, -1]] == pytest.approx([8 * float(aspect), 40 * float(aspect) - 1], abs=1)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".ts", "mpeg2video")])
def test_interlaced_frames_become_progressive(tmp_path: Path, suffix: str, codec: str) -> None:
    """A bar moves between the two fields of a frame. Deinterlacing removes the comb, and keeps number and times."""

    def draw(x: int) -> np.ndarray:
        image = np.full((64, 192, 3), 30, np.uint8)
        image[:, x : x + 16] = 220
        return image

    images = []
    for k in range(10):
        image = draw(8 + 12 * k)
        image[::2] = draw(14 + 12 * k)[::2]  # the second field, half a frame later: the lower field is the first
        images.append(image)

    def set_interlaced(stream: VideoStream) -> None:
        stream.codec_context.options |= {"flags": "+ildct+ilme"}
        if codec == "libx264":
            stream.codec_context.options |= {"x264-params": "interlaced=1:qp=4"}
        else:
            stream.codec_context.time_base, stream.bit_rate = Fraction(1, 25), 4_000_000

    path = write_video(tmp_path / f"i{suffix}", images, setup=set_interlaced, codec=codec)
    frames = list(decode_frames(path))
    assert [f.seconds for f in frames] == pytest.approx([0.04 * k for k in range(10)])

    def comb(image: np.ndarray) -> float:
        return float(np.abs(np.diff(image[8:-8].astype(int), axis=0)).mean())

    assert np.mean([comb(f.pixels) for f in frames]) < 0.3 * np.mean([comb(image) for image in images])
    for frame, k in zip(frames, range(10), strict=True):
        assert np.flatnonzero(frame.pixels[::2, :, 0].mean(axis=0) > 125).mean() == pytest.approx(15.5 + 12 * k, abs=4)


@pytest.mark.parametrize(
    ("matrix", "full_range"), list(itertools.product([Colorspace.ITU709, Colorspace.ITU601], [False, True]))
)
def test_colors_follow_matrix_and_range_of_the_file(tmp_path: Path, matrix: Colorspace, full_range: bool) -> None:
    def tag(stream: VideoStream) -> None:
        stream.codec_context.color_range, stream.codec_context.colorspace = 2 if full_range else 1, matrix

    image = np.full((64, 96, 3), (30, 90, 200), np.uint8)
    path = write_video(tmp_path / "c.mp4", [image] * 3, matrix=matrix, pix_fmt="yuv444p", setup=tag)
    for frame in decode_frames(path):
        np.testing.assert_allclose(frame.pixels.mean(axis=(0, 1)), (30, 90, 200), atol=3)


@pytest.mark.parametrize(("height", "matrix"), [(64, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_matrix_of_an_untagged_video_depends_on_its_height(tmp_path: Path, height: int, matrix: Colorspace) -> None:
    image = np.full((height, 96, 3), (30, 90, 200), np.uint8)
    path = write_video(tmp_path / "c.mp4", [image] * 2, matrix=matrix, pix_fmt="yuv444p")
    for frame in decode_frames(path):
        np.testing.assert_allclose(frame.pixels.mean(axis=(0, 1)), (30, 90, 200), atol=3)


def test_change_of_the_frame_size_is_rejected(tmp_path: Path) -> None:
    first = write_video(tmp_path / "a.ts", gray_images(5))
    second = write_video(tmp_path / "b.ts", [image[:32] for image in gray_images(5)])
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(VideoError, match=r"a\.ts: the frame size changes at frame 5; cut the video there"):
        list(decode_frames(first))


def test_frame_rate_is_the_mean_over_all_timestamps() -> None:
    assert mean_frame_rate([0.0, 0.04, 0.08]) == pytest.approx(25)
    assert mean_frame_rate([0.0, 0.04, 0.16]) == pytest.approx(12.5)
    assert mean_frame_rate([0.0]) == 0


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG"), (1, "")])
def test_high_dynamic_range_is_declared_by_the_header(tmp_path: Path, transfer: int, name: str) -> None:
    def setup(stream: VideoStream) -> None:
        stream.codec_context.color_trc = transfer

    assert read_header(write_video(tmp_path / "hdr.mp4", gray_images(4), setup=setup)).hdr == name


@pytest.mark.usefixtures("new_command")
def test_repeated_frames_are_found() -> None:
    """25 fps content stored at 30 fps repeats every sixth frame."""
    differences = [0.3 + 0.02 * (k % 4) for k in range(24)]
    for k in (5, 11, 17, 23):
        differences[k] = 0.01
    assert find_repeated_frames(differences) == [6, 12, 18, 24]
    assert find_repeated_frames([0.3] * 10) == []
    assert find_repeated_frames([0.0] * 10) == []
