"""One feature per frame of whole rallies.

Windows of the encoder's length start every `stride` frames, and the last one ends at the last frame. The encoder gives
one feature per window and tubelet: the mean over the tokens of that time. A tubelet covers the frames from its first
frame to the frame before the next tubelet. The feature of a frame is the mean over all windows of the tubelet that
covers the frame. With an odd `stride`, frames of one tubelet get different features, because other windows divide the
frames in another way. Flow has no file for the last frame, which gets the feature of the frame before it.

Shapes: N frames of a rally, n frames and W windows of a block, T frames per window, t tubelets per window, D width.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mmdistill import builders
from mmdistill.checkpoint.references import weights_digest
from mmdistill.config import DataModuleConfig, modality_specs
from mmdistill.console import progress
from mmdistill.data.annotations.base import Rally
from mmdistill.data.dataset import CropSpec
from mmdistill.data.readers.base import Reader
from mmdistill.distributed.device import autocast
from mmdistill.errors import format_count, format_first, quote_name
from mmdistill.evaluation.networks import Network
from mmdistill.fewshot.errors import FewshotError
from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import preprocess_clips
from mmdistill.models.videomae import Encoder
from mmdistill.randomness import seeded_rng

DEFAULT_STRIDE = 3  # odd, see above


@dataclass(frozen=True)
class WindowSpec:
    """Windows of a rally.

    Attributes:
        num_frames, sampling_rate: T, and the distance between frames of a window.
        stride: frames between the starts of windows.
    """

    num_frames: int
    sampling_rate: int = 1
    stride: int = DEFAULT_STRIDE

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.num_frames * self.sampling_rate:
            raise FewshotError(
                f"stride={self.stride} must lie between 1 and {self.num_frames * self.sampling_rate}, the length of a "
                "window; otherwise frames have no feature"
            )

    @property
    def span(self) -> int:
        """Frames from the first to the last frame of a window."""
        return (self.num_frames - 1) * self.sampling_rate + 1

    def starts(self, length: int) -> list[int]:
        """First frames of the windows of a rally of `length` frames; none if it is shorter than a window."""
        last = length - self.span
        return [] if last < 0 else sorted({*range(0, last, self.stride), last})


@dataclass(frozen=True)
class _Block:
    """Windows of a rally that are encoded together; each of their frames is read once."""

    rally: int
    first_frame: int
    starts: NDArray[np.int64]  # (W,), relative to `first_frame`


class _Blocks(Dataset[dict[str, object]]):
    """Raw frames (n, ...) of each block."""

    def __init__(self, videos: Sequence[str], blocks: Sequence[_Block], reader: Reader, spec: WindowSpec) -> None:
        self.videos, self.blocks, self.reader, self.spec = videos, blocks, reader, spec

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, object]:
        block = self.blocks[i]
        length = int(block.starts[-1]) + self.spec.span
        frames = self.reader.read(self.videos[block.rally], range(block.first_frame, block.first_frame + length))
        return {"frames": frames, "block": i}


class FrameEncoder:
    """Encodes rallies with several networks of one modality. Each frame of a block is read once.

    Args:
        networks: with the same modality.
        rallies: those shorter than a window are in `too_short` and get no features.
        data: the dataset.
        stride: see `WindowSpec`.
        device: device of the encoders.
        precision: "32", "bf16" or "16".
    """

    def __init__(
        self,
        networks: Sequence[Network],
        rallies: Sequence[Rally],
        data: DataModuleConfig,
        *,
        stride: int = DEFAULT_STRIDE,
        device: torch.device | str = "cpu",
        precision: str = "32",
    ) -> None:
        self.networks, self.data, self.precision = networks, data, precision
        self.modality = networks[0].modality
        self.device = torch.device(device)
        self.windows = WindowSpec(data.num_frames, data.sampling_rate, stride)
        self._without_file = 1 if self.modality == "flow" else 0  # pair k is the motion from frame k to k + 1
        self.lengths = {r.video: r.num_frames - self._without_file for r in rallies}
        self.too_short = [video for video, length in self.lengths.items() if not self.windows.starts(length)]
        self.videos = [video for video in self.lengths if video not in set(self.too_short)]
        if not self.videos:
            raise FewshotError(
                f"none of {format_count(len(rallies), 'rally')} has the {self.windows.span} frames of a window; "
                "lower data_module.num_frames or give longer rallies"
            )

    def num_windows(self, videos: Iterable[str]) -> int:
        """Windows of these rallies, each of which is encoded once per network."""
        return sum(len(self.windows.starts(self.lengths[video])) for video in videos)

    def describe_too_short(self) -> str:
        """A log line about the rallies without features; empty if there are none."""
        if not self.too_short:
            return ""
        count = format_count(len(self.too_short), "rally")
        names = format_first(self.too_short, 3)
        return f"skipping {count} shorter than the {self.windows.span} frames of a window: {names}"

    def encode(
        self, *, batch_size: int, num_workers: int | None, videos: Sequence[str] | None = None
    ) -> Iterator[tuple[str, list[NDArray[np.float32]]]]:
        """Yield (video, features float32 (N, D) of each network) in the order of the rallies.

        Args:
            videos: a part of `self.videos`; None: all.
            batch_size: windows that are encoded at once.
            num_workers: processes that read the frames; None: see `make_clip_loader`.

        Raises:
            FrameError: a frame cannot be read.
            FewshotError: a network returns NaN or infinite values.
        """
        (reader,) = builders.open_readers(self.data, (self.modality,)).values()
        frame_size, crop_size = (tuple(size) for size in (self.data.frame_size, self.data.crop_size))
        crop = CropSpec(frame_size, crop_size, resize=self.data.resize)  # type: ignore[arg-type]
        box = torch.from_numpy(crop.draw_box(seeded_rng(0)))[None]  # the center; nothing is drawn
        specs = [network.spec(modality_specs(self.data)[self.modality]) for network in self.networks]
        for network in self.networks:
            network.encoder.to(self.device).eval()
        videos = self.videos if videos is None else videos
        blocks = self._blocks(videos, batch_size)
        loader = builders.make_clip_loader(
            _Blocks(videos, blocks, reader, self.windows),
            num_workers=num_workers,
            pin_memory=self.device.type == "cuda",
        )
        means: list[FrameMean] = []
        names = ", ".join(network.name for network in self.networks)
        with torch.inference_mode(), progress(f"encoding {names}", self.num_windows(videos)) as advance:
            for item in loader:
                number = int(item["block"])
                block = blocks[number]
                video = videos[block.rally]
                means = means or [FrameMean(self.windows, n.name, video) for n in self.networks]
                frames = item["frames"].to(self.device)
                for network, spec, mean in zip(self.networks, specs, means, strict=True):
                    size = (network.encoder.config.height, network.encoder.config.width)
                    x = preprocess_clips(frames, box, spec, size)[0]  # (C, n, h, w)
                    windows = encode_windows(network.encoder, x, block.starts, self.windows, self.precision)
                    mean.add(windows, block.first_frame + block.starts)
                advance(len(block.starts))
                if number + 1 == len(blocks) or blocks[number + 1].rally != block.rally:
                    padding = ((0, self._without_file), (0, 0))
                    yield video, [np.pad(mean.pop(self.lengths[video]), padding, mode="edge") for mean in means]
                    means = []

    def _blocks(self, videos: Sequence[str], size: int) -> list[_Block]:
        blocks = []
        for rally, video in enumerate(videos):
            starts = np.array(self.windows.starts(self.lengths[video]), dtype=np.int64)
            for part in np.split(starts, range(size, len(starts), size)):
                blocks.append(_Block(rally, int(part[0]), part - part[0]))
        return blocks


def encode_windows(
    encoder: Encoder, x: Tensor, starts: NDArray[np.int64], spec: WindowSpec, precision: str
) -> NDArray[np.float32]:
    """The features of the windows of a block: (C, n, h, w), first frames (W,) in the block -> (W, t, D)."""
    offsets = torch.arange(0, spec.span, spec.sampling_rate)
    windows = x[:, torch.from_numpy(starts)[:, None] + offsets].transpose(0, 1)  # (W, C, T, h, w)
    with autocast(precision, x.device):
        features: NDArray[np.float32] = encoder.embed_times(windows).float().cpu().numpy()
    return features


class FrameMean:
    """The mean over windows of the features of each frame of one video. Windows arrive in the order of their starts.

    Args:
        spec: the windows.
        network, video: names, for messages.
        first: the first frame.
    """

    def __init__(self, spec: WindowSpec, network: str, video: str, first: int = 0) -> None:
        self._spec, self._network, self._video = spec, network, video
        self._first = first  # frame of row 0
        self._sum = np.zeros((0, 0))
        self._count = np.zeros(0, dtype=np.int64)

    def add(self, features: NDArray[np.float32], starts: NDArray[np.int64]) -> None:
        """Add the features (W, t, D) of windows with these first frames (W,).

        Raises:
            FewshotError: a feature is NaN or infinite.
        """
        if not np.isfinite(features).all():
            raise FewshotError(
                f"{self._network}: NaN or infinite features of {quote_name(self._video)}; its frames or the weights "
                "are bad"
            )
        repeats = self._spec.num_frames * self._spec.sampling_rate // features.shape[1]
        num_rows = int(starts[-1]) - self._first + repeats * features.shape[1]
        missing = max(0, num_rows - len(self._count))
        self._sum = np.concatenate([self._sum.reshape(-1, features.shape[2]), np.zeros((missing, features.shape[2]))])
        self._count = np.concatenate([self._count, np.zeros(missing, dtype=np.int64)])
        for start, window in zip(starts - self._first, features, strict=True):
            rows = slice(start, start + repeats * len(window))
            self._sum[rows] += np.repeat(window, repeats, axis=0)
            self._count[rows] += 1

    def pop(self, end: int) -> NDArray[np.float32]:
        """The features of the frames before `end` that were not returned yet: (n, D)."""
        num_rows = end - self._first
        mean: NDArray[np.float32] = (self._sum[:num_rows] / self._count[:num_rows, None]).astype(np.float32)
        self._sum, self._count, self._first = self._sum[num_rows:], self._count[num_rows:], end
        return mean


def write_frame_features(encoder: FrameEncoder, output: Path, *, batch_size: int, num_workers: int | None) -> int:
    """Write the features of one network, one file ``OUTPUT/VIDEO.npy`` (float16, (N, D)) per rally.

    ``OUTPUT/features.json`` describes the network and the windows. Files of an interrupted call are kept if it is the
    same. Returns the number of windows that were encoded.

    Raises:
        FewshotError: the folder has features of another network or with other windows; or see `FrameEncoder.encode`.
    """
    (network,) = encoder.networks
    description: dict[str, Any] = {
        "network": network.name,
        "checkpoint": network.checkpoint,
        "weights": weights_digest(network.encoder),
        "modality": encoder.modality,
        "dataset": encoder.data.name,
        "num_frames": encoder.windows.num_frames,
        "sampling_rate": encoder.windows.sampling_rate,
        "stride": encoder.windows.stride,
        "precision": encoder.precision,
        **({"resize": encoder.data.resize} if encoder.data.resize != "crop" else {}),
    }
    path = output / "features.json"
    if path.exists() and (found := json.loads(path.read_text())) != description:
        differing = [key for key in {**found, **description} if found.get(key) != description.get(key)]
        raise FewshotError(f"{path}: another {', '.join(differing)}; choose another folder")
    atomic_write_bytes(path, json.dumps(description, indent=1).encode() + b"\n")
    missing = [video for video in encoder.videos if not (output / f"{video}.npy").exists()]
    for video, (features,) in encoder.encode(batch_size=batch_size, num_workers=num_workers, videos=missing):
        buffer = BytesIO()
        np.save(buffer, features.astype(np.float16))
        atomic_write_bytes(output / f"{video}.npy", buffer.getvalue())
    return encoder.num_windows(missing)
