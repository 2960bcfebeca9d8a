"""Decoding of video files with PyAV (FFmpeg): upright, progressive frames with square pixels and their timestamps."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from mmdistill.console import log_once
from mmdistill.errors import InputError, format_count, format_first

VIDEO_SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".3gp",
    ".3g2", ".asf", ".divx", ".dv", ".f4v", ".flv", ".m2t", ".m2v", ".mod", ".mts2", ".mxf", ".ogm", ".ogv", ".qt",
    ".rm", ".rmvb", ".tod", ".vob",
)  # fmt: skip
MACOS_PREFIX, MACOS_FOLDER_FILE = (
    "._",
    ".DS_Store",
)  # of files with the attributes of another file, which macOS writes on foreign disks
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # transfer characteristics of HDR video (ITU-T H.273)
COUNT_TOLERANCE = 0.02  # containers without an index only estimate their number of frames
TS_PACKET_BYTES = (188, 192, 204)  # MPEG transport streams declare no length, but consist of packets of one size
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
HD_HEIGHT = 720  # px; players assume BT.709 for unspecified videos from this height on, else BT.601


class VideoError(InputError):
    """A video that cannot be decoded to its end. The message names the file and the last decoded frame."""


@dataclass(frozen=True)
class Frame:
    """Frame `number`, counted from 0, shown `seconds` after the first; `pixels` is uint8 (H, W, 3) BGR."""

    number: int
    seconds: float
    pixels: np.ndarray
    is_interlaced: bool = False  # in the file; `pixels` are progressive


@dataclass(frozen=True)
class Header:
    """What a container declares about its video stream."""

    frames: int = 0  # 0 if not declared
    is_estimate: bool = False  # whether `frames` is estimated from duration and frame rate
    seconds: float = 0.0  # 0 if not declared
    frame_size: tuple[int, int] = (0, 0)  # (height, width) in px, upright, with square pixels
    hdr: str = ""  # transfer function of high dynamic range, see `HDR_TRANSFERS`; empty: standard dynamic range


def decode_frames(path: Path) -> Iterator[Frame]:
    """Yield every frame of a video in the order of presentation, at any frame rate, without repeating or skipping one.

    Frames that an edit list cuts off are not presented. Frames are rotated as the file requests, widened to square
    pixels, deinterlaced (one frame per coded frame) and converted to full-range BGR with the matrix and range of the
    file.

    Raises:
        VideoError: the file cannot be opened or decoded to its end, the frame size changes, it has fewer frames than
            the container declares, with `COUNT_TOLERANCE`, or it ends in the middle of a frame. Without a declared
            length, a cut that damages no frame and no packet is not detected.
    """
    number, start, seconds, size = 0, 0.0, 0.0, (0, 0)
    declared, is_estimate, duration, failure, is_cut = 0, False, 0.0, None, False
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: contains no video stream; give a video file")
            stream = container.streams.video[0]
            declared, is_estimate, duration = _declared_length(container)
            splits_packet = container.format.name == "mpegts" and all(path.stat().st_size % n for n in TS_PACKET_BYTES)
            for frame, is_interlaced in _deinterlace(container.decode(stream)):
                if number == 0:
                    start, size = frame.time or 0.0, (frame.width, frame.height)
                elif (frame.width, frame.height) != size:
                    raise VideoError(f"{path}: the frame size changes at frame {number}; cut the video there")
                seconds = seconds if frame.time is None else frame.time - start
                yield Frame(number, seconds, _to_pixels(frame, stream), is_interlaced)
                number += 1
                is_cut = splits_packet or frame.is_corrupt
    except (av.FFmpegError, OSError) as error:
        failure = error
    if number == 0:
        reason = (failure.strerror or failure) if failure else "no frame can be decoded"
        raise VideoError(
            f"{path}: not a video that FFmpeg can decode ({reason}); copy it again, or encode it as H.264"
        ) from failure
    end = seconds * number / max(1, number - 1)  # an edit list shortens the duration, but not the declared count
    is_short = number < declared * (1 - COUNT_TOLERANCE) - 1 and end < duration * (1 - COUNT_TOLERANCE)
    if is_short or is_cut or (failure and not 0 < declared <= number):
        about, source = ("about ", " (estimated from duration and frame rate)") if is_estimate else ("", "")
        expected = f"but the container declares {about}{format_count(declared, 'frame')}{source}"
        expected = expected if declared else str(failure)
        expected = "in the middle of a frame" if is_cut else expected
        message = f"{path}: truncated or broken, it ends after frame {number - 1}, {expected}; copy or encode it again"
        raise VideoError(message) from failure


def _declared_length(container: InputContainer) -> tuple[int, bool, float]:
    """Frames that the container declares, whether they are an estimate, and seconds; 0 if it declares none."""
    stream = container.streams.video[0]
    if stream.frames and stream.average_rate and "mp4" not in container.format.name:
        duration = stream.frames / float(stream.average_rate)  # FFmpeg estimates that of a truncated .avi from its size
    elif stream.duration and stream.time_base:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = (container.duration or 0) / av.time_base
    if stream.frames:
        return stream.frames, False, duration
    return round(duration * float(stream.average_rate or 0)), True, duration


def _deinterlace(frames: Iterable[VideoFrame]) -> Iterator[tuple[VideoFrame, bool]]:
    """The frames, with interlaced ones converted to progressive ones by FFmpeg's filter bwdif.

    The second value is whether an interlaced frame has occurred.
    """
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
            )
            bwdif = graph.add("bwdif", "mode=send_frame:deint=interlaced")
            graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
        yield from ((out, graph is not None) for out in ([frame] if graph is None else _filter(graph, frame)))
    if graph is not None:
        yield from ((out, True) for out in _filter(graph, None))


def _filter(graph: av.filter.Graph, frame: VideoFrame | None) -> Iterator[VideoFrame]:
    """Push a frame, or None at the end, and yield all frames that the filter can return."""
    graph.vpush(frame)
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return


def _to_pixels(frame: VideoFrame, stream: VideoStream) -> np.ndarray:
    """uint8 (H, W, 3) BGR, upright, with square pixels."""
    aspect = stream.sample_aspect_ratio or 1
    is_hd = frame.colorspace == UNSPECIFIED and frame.height >= HD_HEIGHT
    image = frame.reformat(
        format="bgr24", width=max(1, round(frame.width * aspect)), src_colorspace=Colorspace.ITU709 if is_hd else None
    )
    return np.ascontiguousarray(np.rot90(image.to_ndarray(), frame.rotation // 90))


def read_header(path: Path) -> Header:
    """Read what the container declares; an empty header for a file that is no video."""
    with suppress(av.FFmpegError, OSError, IndexError), av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames, is_estimate, seconds = _declared_length(container)
        size = (stream.height, max(1, round(stream.width * (stream.sample_aspect_ratio or 1))))
        return Header(frames, is_estimate, seconds, size, HDR_TRANSFERS.get(stream.codec_context.color_trc, ""))
    return Header()


def read_frames(path: Path, fps: float | None = None) -> Iterator[Frame]:
    """Yield the frames of `decode_frames`, or with `fps` the nearest frame to each multiple of 1 / fps seconds.

    Raises the errors of `decode_frames`.
    """
    if fps is None:
        yield from decode_frames(path)
        return
    number, previous = 0, None
    for frame in decode_frames(path):
        while previous is not None and number / fps < (previous.seconds + frame.seconds) / 2:
            yield replace(previous, number=number, seconds=number / fps)
            number += 1
        previous = frame
    while previous is not None and number / fps <= previous.seconds + 1e-6:
        yield replace(previous, number=number, seconds=number / fps)
        number += 1


def mean_frame_rate(seconds: list[float]) -> float:
    """Mean frame rate in fps from the timestamps of all frames; 0 for fewer than two frames."""
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return 0.0
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def find_repeated_frames(differences: list[float]) -> list[int]:
    """Numbers of frames that repeat the previous frame, as in 25 fps footage stored at 30 fps. Their flow is zero.

    `differences` are the mean absolute differences between frames k and k + 1. A frame repeats the previous one if its
    difference is less than 0.4 times the median difference within three frames.
    """
    medians = [float(np.median(differences[max(0, k - 3) : k + 4])) for k in range(len(differences))]
    return [k + 1 for k, median in enumerate(medians) if differences[k] < 0.4 * median]


def find_videos(source: Path) -> dict[str, Path]:
    """Video files below a folder, or the single file `source`, by file name without suffix, sorted.

    The suffix decides (`VIDEO_SUFFIXES`). Linked folders are followed. The log counts the files of a folder that are no
    videos, and the files that macOS writes (``._NAME``, ``.DS_Store``).

    Raises:
        VideoError: there is no video, or two videos have the same name.
    """
    if source.is_file():
        return {source.stem: source}
    if not source.is_dir():
        raise VideoError(f"{source}: no such file or folder")
    found: dict[str, Path] = {}
    skipped: dict[str, list[str]] = {"of macOS": [], "without the suffix of a video": []}
    for path in sorted(p for p in _walk(source) if p.is_file()):
        if path.name.startswith(MACOS_PREFIX) or path.name == MACOS_FOLDER_FILE:
            skipped["of macOS"].append(path.name)
            continue
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            skipped["without the suffix of a video"].append(path.name)
            continue
        if path.stem in found:
            raise VideoError(
                f"{path} and {found[path.stem]} have the same name; rename one, because output files are named after it"
            )
        found[path.stem] = path
    for kind, names in skipped.items():
        if names:
            log_once(f"{source}: skipping {format_count(len(names), 'file')} {kind} ({format_first(names, 3)})")
    if not found:
        raise VideoError(f"{source}: no video file ({', '.join(VIDEO_SUFFIXES)})")
    return found


def _walk(source: Path) -> Iterator[Path]:
    """All files below a folder, also in linked folders; each folder once."""
    visited = set()
    for folder, names, files in os.walk(source, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:
            names.clear()
            continue
        visited.add(real)
        yield from (Path(folder, name) for name in files)
