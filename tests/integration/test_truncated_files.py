"""A truncated input file of any format is one error that names the file. No part of it is used."""

import json
import pickle
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from av.video.stream import VideoStream
from safetensors.torch import save_file

from mmdistill.checkpoint import read_checkpoint
from mmdistill.data.annotations.base import load_annotations
from mmdistill.data.readers.flow_file import read_flow, write_flow
from mmdistill.data.readers.image_file import decode_image
from mmdistill.data.readers.safe_pickle import load_pickle
from mmdistill.errors import MMDistillError
from mmdistill.fewshot.features import load_features
from mmdistill.prepare.video import decode_frames
from tests.generated_annotations import make_f3set_entries
from tests.generated_video import write_video

RNG = np.random.default_rng(0)
VIDEO_CODECS = {
    ".mp4": "libx264", ".mov": "libx264", ".3gp": "libx264", ".mkv": "libx264", ".webm": "libvpx", ".ts": "libx264",
    ".MTS": "mpeg2video", ".m2ts": "libx264", ".mpg": "mpeg2video", ".wmv": "wmv2", ".avi": "mpeg4",
}  # fmt: skip


def _make_video(path: Path, codec: str) -> None:
    rng = np.random.default_rng(0)

    def set_time_base(stream: VideoStream) -> None:
        stream.codec_context.time_base = Fraction(1, 25)

    noise = [
        cv2.resize(rng.integers(0, 255, (6, 8, 3), np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
        for _ in range(40)
    ]
    write_video(path, noise, codec=codec, setup=set_time_base)


def _encode(suffix: str) -> bytes:
    data: bytes = cv2.imencode(suffix, RNG.integers(0, 255, (32, 32, 3), np.uint8))[1].tobytes()
    return data


def _save_npz(path: Path) -> None:
    np.savez(path, features=RNG.normal(size=(10, 8)), labels=np.arange(10))


# suffix -> writes a file, reads it
FORMATS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    **{
        suffix: (partial(_make_video, codec=codec), lambda path: list(decode_frames(path)))
        for suffix, codec in VIDEO_CODECS.items()
    },
    ".jpg": (
        lambda path: path.write_bytes(_encode(".jpg")),
        lambda path: decode_image(str(path), path.read_bytes(), ("JPEG",), cv2.IMREAD_COLOR),
    ),
    ".png": (
        lambda path: path.write_bytes(_encode(".png")),
        lambda path: decode_image(str(path), path.read_bytes(), ("PNG",), cv2.IMREAD_COLOR),
    ),
    ".npy": (lambda path: write_flow(path, RNG.normal(size=(2, 8, 8)).astype(np.float32)), read_flow),
    ".npz": (_save_npz, load_features),
    ".pkl": (lambda path: path.write_bytes(pickle.dumps({"keypoint": RNG.normal(size=(2, 4, 17, 2))})), load_pickle),
    ".safetensors": (
        lambda path: save_file({"a": torch.ones(64)}, path),
        lambda path: read_checkpoint(path).state_dict,
    ),
    ".pth": (lambda path: torch.save({"a": torch.ones(64)}, path), lambda path: read_checkpoint(path).state_dict),
    ".json": (lambda path: path.write_text(json.dumps(make_f3set_entries(matches=1))), load_annotations),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_truncated_file_is_one_error_that_names_the_file(tmp_path: Path, suffix: str) -> None:
    write, read = FORMATS[suffix]
    path = tmp_path / f"whole{suffix}"
    write(path)
    read(path)
    data = path.read_bytes()
    for share in (0.1, 0.5):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(data[: int(len(data) * share) | 1])  # an odd size is not between two packets of a .ts file
        with pytest.raises(MMDistillError) as caught:
            read(cut)
        assert str(cut) in str(caught.value), share
