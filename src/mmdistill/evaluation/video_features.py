"""Features per frame of a video that is decoded once, without a prepared dataset.

Windows and means are those of `mmdistill.evaluation.frame_features`. Only the frames of the current windows are in
memory, so that a match of any length can be encoded.

Shapes: N frames of a video, n frames and W windows of a block, D width.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmdistill.checkpoint import open_checkpoint
from mmdistill.checkpoint.student import Student, load_student
from mmdistill.data.dataset import CropSpec
from mmdistill.evaluation.frame_features import DEFAULT_STRIDE, FrameMean, WindowSpec, encode_windows
from mmdistill.fewshot.errors import FewshotError
from mmdistill.modalities import ModalitySpec, get_modality, preprocess_clips
from mmdistill.randomness import seeded_rng

Range = tuple[int, int]  # first frame, and the frame after the last one
TO_END = sys.maxsize  # end of a range that ends with the video


@dataclass(frozen=True)
class _Block:
    """Windows that are encoded together. `frames` begin at the first window."""

    frames: NDArray[np.uint8]  # (n, H, W, 3)
    starts: NDArray[np.int64]  # (W,), first frames in the video


def load_video_encoder(
    checkpoint: str, *, stride: int = DEFAULT_STRIDE, device: torch.device | str = "cpu", precision: str = "32"
) -> "VideoEncoder":
    """The student or the only rgb encoder of a checkpoint. Its metadata give the frame size and the sampling rate.

    Raises:
        CheckpointError: the checkpoint cannot be read, or has no rgb encoder.
        FewshotError: `stride` is larger than a window.
    """
    student = load_student(checkpoint, device=device)
    stored = (open_checkpoint(checkpoint).meta.get("config") or {}).get("data_module") or {}
    windows = WindowSpec(student.num_frames, stored.get("sampling_rate", 1), stride)
    return VideoEncoder(student, windows, precision=precision)


class VideoEncoder:
    """Encodes the frames of a video in their order.

    Args:
        student: the network. Its `frame_size` is the size (H, W) of the frames.
        windows: with the number of frames of the student.
        batch_size: windows that are encoded at once.
        precision: "32", "bf16" or "16".
    """

    def __init__(self, student: Student, windows: WindowSpec, *, batch_size: int = 8, precision: str = "32") -> None:
        extractor = student.extractor
        self.encoder, self.windows, self.batch_size, self.precision = extractor.encoder, windows, batch_size, precision
        config = extractor.encoder.config
        self.frame_size = student.frame_size
        self._size = (config.height, config.width)
        crop = CropSpec(student.frame_size, self._size, resize=student.resize)
        self._box = torch.from_numpy(crop.draw_box(seeded_rng(0)))[None]  # centered; nothing is drawn
        self._spec: ModalitySpec = get_modality("rgb").spec(mean=extractor.mean, std=extractor.std)

    def encode(
        self, name: str, frames: Iterable[NDArray[np.uint8]], ranges: Sequence[Range]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield parts of the features in their order: the first frame and the features (n, D) of consecutive frames.

        Args:
            name: name of the video, for messages.
            frames: uint8 (H, W, 3) RGB each, from frame 0 on, to the end of the video or to `span` frames after the
                last range.
            ranges: frames that need features. All windows that contain one of them are encoded, so the features are the
                same for any other ranges.

        Raises:
            FewshotError: the video is shorter than a window, or a feature is NaN or infinite.
        """
        mean: FrameMean | None = None
        last = 0  # first frame of the last window
        for block in self._blocks(name, frames, ranges):
            if mean is not None and block.starts[0] > last + self.windows.stride:
                yield from self._finish(mean, last)
                mean = None
            if mean is None:
                mean, begin = FrameMean(self.windows, "the encoder", name, int(block.starts[0])), int(block.starts[0])
            mean.add(self._encode_block(block), block.starts)
            last = int(block.starts[-1])
            yield begin, mean.pop(last + 1)  # the next window can start at the next frame
            begin = last + 1
        if mean is not None:
            yield from self._finish(mean, last)

    def _finish(self, mean: FrameMean, last: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        if self.windows.span > 1:
            yield last + 1, mean.pop(last + self.windows.span)

    def _blocks(self, name: str, frames: Iterable[NDArray[np.uint8]], ranges: Sequence[Range]) -> Iterator[_Block]:
        span, stride = self.windows.span, self.windows.stride
        recent: list[NDArray[np.uint8]] = []  # the last frames, which the current and later windows need
        starts: list[int] = []
        count = 0

        def is_needed(start: int) -> bool:
            return any(first < start + span and start < end for first, end in ranges)

        def block() -> _Block:
            offset = starts[0] - (count - len(recent))
            return _Block(np.stack(recent[offset:]), np.array(starts, dtype=np.int64))

        for frame in frames:
            recent.append(frame)
            count += 1
            start = count - span
            is_window = start >= 0 and start % stride == 0
            if is_window and is_needed(start):
                starts.append(start)
            if starts and (len(starts) == self.batch_size or (is_window and starts[-1] != start)):
                yield block()
                starts = []
            if not starts:
                del recent[: max(0, len(recent) - span)]
        if count < span:
            raise FewshotError(
                f"{name}: has {count} frames, fewer than the {span} of a window of the encoder; give a longer video"
            )
        if (count - span) % stride and is_needed(count - span):  # the last window ends at the last frame
            starts.append(count - span)
        if starts:
            yield block()

    def _encode_block(self, block: _Block) -> NDArray[np.float32]:
        device = self.encoder.patch_embed.proj.weight.device
        with torch.inference_mode():
            frames = torch.from_numpy(block.frames)[None].to(device)
            x = preprocess_clips(frames, self._box, self._spec, self._size)[0]  # (C, n, h, w)
            starts = block.starts - block.starts[0]
            return encode_windows(self.encoder, x, starts, self.windows, self.precision)
