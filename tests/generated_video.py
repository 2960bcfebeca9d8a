"""Generated videos: any images, a moving square, and a clip like a tennis broadcast."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

SQUARE_SIZE = (96, 160)  # height, width of a moving-square video, px


def write_video(
    path: Path,
    images: Sequence[np.ndarray],
    *,
    times_ms: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    matrix: Colorspace = Colorspace.ITU601,
    setup: Callable[[VideoStream], None] = lambda stream: None,
    codec: str = "libx264",
) -> Path:
    """Encode BGR images. `setup` changes the stream before it is opened.

    Args:
        path: the file.
        images: uint8 (H, W, 3).
        times_ms: timestamps of presentation; None: 25 fps.
        pix_fmt: pixel format of the encoder.
        matrix: matrix of the conversion from BGR.
        setup: gets the stream.
        codec: FFmpeg's name of the encoder.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = pix_fmt, Fraction(1, 1000)
        setup(stream)
        for k, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="bgr24").reformat(
                format=pix_fmt, dst_colorspace=matrix, dst_color_range=stream.codec_context.color_range or None
            )
            frame.pts, frame.time_base = 40 * k if times_ms is None else times_ms[k], Fraction(1, 1000)
            frame.colorspace = stream.codec_context.colorspace
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def gray_images(count: int) -> list[np.ndarray]:
    """Flat images; image k has the level 20 k."""
    return [np.full((64, 96, 3), 20 * k, np.uint8) for k in range(count)]


def write_frame_folder(
    folder: Path, images: Sequence[np.ndarray], *, first: int = 0, pattern: str = "{:06d}.jpg"
) -> Path:
    """A folder of numbered JPEGs of BGR images; `first` is the number of the first file."""
    folder.mkdir(parents=True)
    for number, image in enumerate(images, first):
        cv2.imwrite(str(folder / pattern.format(number)), image)
    return folder


def write_moving_square(path: Path, *, frames: int = 20, fps: float = 25.0, seed: int = 0) -> Path:
    """A textured square that moves 4 px right and 2 px down per frame on a textured background, as Motion JPEG."""
    rng = np.random.default_rng(seed)
    height, width = SQUARE_SIZE
    background = cv2.GaussianBlur(rng.integers(0, 80, (height, width, 3), np.uint8), (0, 0), 2)
    square = cv2.GaussianBlur(rng.integers(100, 255, (40, 40, 3), np.uint8), (0, 0), 1.5)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    assert writer.isOpened()
    for k in range(frames):
        image = background.copy()
        x, y = 8 + 4 * k, 6 + 2 * k
        region = image[y : y + 40, x : x + 40]
        region[:] = square[: region.shape[0], : region.shape[1]]
        writer.write(image)
    writer.release()
    return path


@dataclass(frozen=True)
class BroadcastClip:
    """A generated broadcast clip.

    Attributes:
        path: the ``.mp4`` file.
        num_frames: frames of the file.
        repeated: numbers of frames that repeat the previous frame.
        near, far: (T, 2) x, y of the players' centers in px. NaN after the cut.
        cut: first frame of the second shot, which shows no court.
    """

    path: Path
    num_frames: int
    repeated: list[int]
    near: np.ndarray
    far: np.ndarray
    cut: int


def write_broadcast_clip(
    path: Path, *, num_frames: int = 60, cut: int = 52, size: tuple[int, int] = (720, 1280)
) -> BroadcastClip:
    """A static camera behind a court, a large near and a small far player, then a cut to another shot.

    The file has 30 fps and the content 25 fps, as in real broadcasts: frames 3, 9, 15, ... repeat the previous frame.
    """
    rng = np.random.default_rng(0)
    height, width = size
    court = cv2.resize(rng.integers(60, 120, (36, 64, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for y in (0.2, 0.45, 0.85):
        cv2.line(court, (width // 8, int(y * height)), (width * 7 // 8, int(y * height)), (225, 225, 225), 3)
    crowd = cv2.resize(rng.integers(0, 255, (90, 160, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    court[: height // 9], court[-height // 9 :] = crowd[: height // 9], crowd[-height // 9 :] // 2  # above and below
    textures = [cv2.resize(rng.integers(150, 255, (8, 4, 3), np.uint8), (w, h)) for w, h in ((60, 150), (26, 64))]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 30.0, (width, height))
    assert writer.isOpened()
    repeated = list(range(3, num_frames, 6))
    centers = np.full((2, num_frames, 2), np.nan)
    image, step = court, 0
    for k in range(num_frames):
        if k not in repeated:
            image = (crowd if k >= cut else court).copy()
            if k < cut:
                near = (300 + 11 * step, 540 + int(12 * np.sin(step / 3)))
                far = (820 - 7 * step, 180 + int(6 * np.sin(step / 4)))
                for (x, y), texture in zip((near, far), textures, strict=True):
                    h, w = texture.shape[:2]
                    image[y - h // 2 : y + h // 2, x - w // 2 : x + w // 2] = texture
            noise = rng.integers(0, 6, (height // 4, width // 4, 1), np.uint8)  # of the camera sensor
            image = cv2.add(image, np.repeat(cv2.resize(noise, (width, height))[..., None], 3, axis=2))
            step += 1
        if k < cut:
            centers[:, k] = near, far
        writer.write(image)
    writer.release()
    return BroadcastClip(path, num_frames, repeated, centers[0], centers[1], cut)


def write_pan(path: Path, video: Path, offsets: np.ndarray, size: tuple[int, int], *, shrink: int = 1) -> Path:
    """Crops of a video, as a moving camera sees it, reduced by the factor `shrink`.

    `offsets` (T, 2) are x, y of the crops and `size` their (height, width), in px of the video.
    """
    images = []
    with av.open(str(video)) as container:
        for (x, y), frame in zip(offsets.tolist(), container.decode(video=0), strict=False):
            crop = frame.to_ndarray(format="bgr24")[y : y + size[0], x : x + size[1]]
            small = (size[1] // shrink, size[0] // shrink)
            images.append(cv2.resize(crop, small, interpolation=cv2.INTER_AREA))
    return write_video(path, images)
