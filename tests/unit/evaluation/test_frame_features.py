"""One feature per frame: which windows are encoded, and which of them a frame averages."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill import builders
from mmdistill.config import modality_specs
from mmdistill.data.annotations.base import Rally
from mmdistill.evaluation.frame_features import FrameEncoder, WindowSpec, write_frame_features
from mmdistill.evaluation.networks import load_network
from mmdistill.fewshot.errors import FewshotError
from mmdistill.modalities import get_modality
from tests import tiny_data
from tests.configs import distill_config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data.make_tiny(tmp_path_factory.mktemp("tiny"), per_class=1)


def make_encoder(root: Path, tmp_path: Path, modality: str = "rgb", *more: str, **options: Any) -> FrameEncoder:
    data = distill_config("train=False", "ckpt_path=x", *tiny_data.overrides(root), *more).data_module
    path = tiny_data.write_teacher(tmp_path / modality, modality, seed=1)
    rallies = builders.load_rallies(data, builders.resolve_annotation_path(data, training=False))
    return FrameEncoder([load_network(path, data=data)], rallies, data, **options)


def expected_features(encoder: FrameEncoder, video: str) -> np.ndarray:
    """For each frame, the mean over all windows of the tubelet with the frame, one window at a time."""
    (network,), (name,) = encoder.networks, [encoder.modality]
    spec, length = modality_specs(encoder.data)[name], encoder.lengths[video]
    reader = builders.open_readers(encoder.data, (name,))[name]
    box = torch.tensor([[0.0, 2, 32, 32, 0]])  # the center of 32 x 36 px
    size = (network.encoder.config.height, network.encoder.config.width)
    found: dict[int, list[np.ndarray]] = {frame: [] for frame in range(length)}
    rate = encoder.windows.sampling_rate
    for start in encoder.windows.starts(length):
        frames = [start + rate * k for k in range(4)]
        raw = torch.from_numpy(reader.read(video, frames))[None]
        x = get_modality(name).preprocess(raw, box, spec, size)
        with torch.inference_mode():
            tokens = network.encoder(x)[0].view(2, -1, 16).mean(dim=1)
            tokens = torch.nn.functional.layer_norm(tokens, (16,), eps=1e-6).numpy()
        for tubelet in range(2):
            for frame in range(start + 2 * rate * tubelet, min(start + 2 * rate * (tubelet + 1), length)):
                found[frame].append(tokens[tubelet])
    return np.stack([np.mean(values, axis=0) for values in found.values()])


@pytest.mark.parametrize(
    ("modality", "stride", "batch", "more"),
    [
        ("rgb", 3, 2, []),
        ("rgb", 1, 100, []),
        ("rgb", 4, 1, ["data_module.sampling_rate=2"]),
        ("flow", 3, 2, []),
        ("skeleton", 3, 2, []),
    ],
)
def test_a_frame_averages_all_windows_that_cover_it(
    tiny: Path, tmp_path: Path, modality: str, stride: int, batch: int, more: list[str]
):
    encoder = make_encoder(tiny, tmp_path, modality, *more, stride=stride)
    found = dict(encoder.encode(batch_size=batch, num_workers=0))
    assert list(found) == encoder.videos == [f"rally_{direction}_0" for direction in tiny_data.DIRECTIONS]
    for video, (features,) in found.items():
        expected = expected_features(encoder, video)
        assert features.shape == (tiny_data.FRAMES, 16)  # the first and the last frame included
        np.testing.assert_allclose(features[: len(expected)], expected, atol=1e-5)
        if modality == "flow":  # has no file for the last frame
            np.testing.assert_array_equal(features[-1], features[-2])


def test_the_number_of_encoded_windows_is_the_announced_one(tiny: Path, tmp_path: Path, monkeypatch):
    encoder = make_encoder(tiny, tmp_path, stride=3)
    encoded = []
    network = encoder.networks[0].encoder
    embed = network.embed_times
    monkeypatch.setattr(network, "embed_times", lambda x: (encoded.append(len(x)), embed(x))[1])
    list(encoder.encode(batch_size=3, num_workers=0))
    assert (
        sum(encoded) == encoder.num_windows(encoder.videos) == 4 * 4
    )  # starts 0, 3, 6, 8 of 12 frames with windows of 4


def test_windows_cover_all_frames():
    for length in range(7, 40):
        for stride in range(1, 9):
            spec = WindowSpec(4, 2, stride)
            covered = {frame for start in spec.starts(length) for frame in range(start, start + 8)}
            assert set(range(length)) <= covered
            assert spec.starts(length)[-1] == length - spec.span
    assert WindowSpec(4, 2, 3).starts(6) == []


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_leaves_frames_without_a_feature_is_rejected(stride: int):
    with pytest.raises(FewshotError, match=f"stride={stride} must lie between 1 and 4"):
        WindowSpec(4, 1, stride)


def test_rallies_shorter_than_a_window_are_named(tiny: Path, tmp_path: Path):
    encoder = make_encoder(tiny, tmp_path)
    short, long = Rally("short", 3, 25.0, ()), Rally("rally_CC_0", 12, 25.0, ())
    found = FrameEncoder(encoder.networks, [short, long], encoder.data)
    assert (found.videos, found.describe_too_short()) == (
        ["rally_CC_0"],
        "skipping 1 rally shorter than the 4 frames of a window: short",
    )
    with pytest.raises(FewshotError, match="none of 1 rally has the 4 frames"):
        FrameEncoder(encoder.networks, [short], encoder.data)


def test_an_interrupted_job_writes_only_the_missing_files(tiny: Path, tmp_path: Path):
    encoder, output = make_encoder(tiny, tmp_path), tmp_path / "features"
    assert write_frame_features(encoder, output, batch_size=8, num_workers=0) == encoder.num_windows(encoder.videos)
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(first) == {"features.json", *(f"{video}.npy" for video in encoder.videos)}
    features = np.load(output / "rally_CC_0.npy")
    assert (features.dtype, features.shape) == (np.float16, (tiny_data.FRAMES, 16))
    (output / "rally_T_0.npy").unlink()
    assert write_frame_features(encoder, output, batch_size=3, num_workers=0) == encoder.num_windows(["rally_T_0"])
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first


def test_a_folder_with_other_features_is_rejected(tiny: Path, tmp_path: Path):
    output = tmp_path / "features"
    write_frame_features(make_encoder(tiny, tmp_path), output, batch_size=8, num_workers=0)
    with pytest.raises(FewshotError, match=r"features.json: another stride; choose another folder"):
        write_frame_features(make_encoder(tiny, tmp_path, stride=1), output, batch_size=8, num_workers=0)
