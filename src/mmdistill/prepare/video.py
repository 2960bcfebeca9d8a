"""Decoding of video files with PyAV (FFmpeg): upright, progressive frames with square pixels and their timestamps."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from mmdistill.errors import InputError, format_count

HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # transfer characteristics of HDR video (ITU-T H.273)
COUNT_TOLERANCE = 0.02  # containers without an index only estimate their number of frames
TS_PACKET_BYTES = (188, 192, 204)  # MPEG transport streams declare no length, but consist of packets of one size
UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
HD_HEIGHT = 720  # px; players assume BT.709 for unspecified videos from this height on, else BT.601
NO_PIXELS = np.empty((0, 0, 3), np.uint8)  # of a frame that is not needed


class VideoError(InputError):
    """A video that cannot be decoded to its end. The message names the file and the last decoded frame."""


@dataclass(frozen=True)
class Frame:
    """Frame `number`, counted from 0, shown `seconds` after the first; `pixels` is uint8 (H, W, 3) BGR."""

    number: int
    seconds: float  # 0 for all frames of a folder of JPEGs
    pixels: np.ndarray
    is_interlaced: bool = False  # in the file; `pixels` are progressive
    jpeg: bytes = b""  # content of the file, if the frame is a file of a folder of JPEGs


@dataclass(frozen=True)
class Header:
    """What a container declares about its video stream."""

    frames: int = 0  # 0 if not declared
    is_estimate: bool = False  # whether `frames` is estimated from duration and frame rate
    seconds: float = 0.0  # 0 if not declared
    fps: float = 0.0  # mean frame rate; 0 if not declared
    frame_size: tuple[int, int] = (0, 0)  # (height, width) in px, upright, with square pixels
    hdr: str = ""  # transfer function of high dynamic range, see `HDR_TRANSFERS`; empty: standard dynamic range


def decode_frames(path: Path, needs_pixels: Callable[[int], bool] = lambda _: True) -> Iterator[Frame]:
    """Yield every frame of a video in the order of presentation, at any frame rate, without repeating or skipping one.

    All frames are decoded. Those for whose number `needs_pixels` is false are not converted and have `NO_PIXELS`.

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
                pixels = _to_pixels(frame, stream) if needs_pixels(number) else NO_PIXELS
                yield Frame(number, seconds, pixels, is_interlaced)
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
        fps, hdr = float(stream.average_rate or 0), HDR_TRANSFERS.get(stream.codec_context.color_trc, "")
        return Header(frames, is_estimate, seconds, fps, size, hdr)
    return Header()


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
