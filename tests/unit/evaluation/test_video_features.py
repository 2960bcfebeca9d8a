"""Features of frames that arrive one after the other equal those of a prepared rally."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.student import FeatureExtractor, Student
from mmdistill.evaluation.frame_features import WindowSpec
from mmdistill.evaluation.video_features import TO_END, VideoEncoder, load_video_encoder
from mmdistill.fewshot.errors import FewshotError
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests import tiny_data

SIZE = (32, 36)


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    config = EncoderConfig(3, 4, 32, 32, 8, 2, dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32)
    return Student(FeatureExtractor(Encoder(config).eval(), "rgb", (0.5,) * 3, (0.2,) * 3), SIZE)


def make_frames(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 255, (count, *SIZE, 3), np.uint8))


def expected(student: Student, frames: list[np.ndarray], spec: WindowSpec) -> np.ndarray:
    """The mean over all windows of the tubelet with each frame, one window at a time."""
    found: list[list[np.ndarray]] = [[] for _ in frames]
    for start in spec.starts(len(frames)):
        clip = np.stack(frames[start : start + spec.span : spec.sampling_rate])[:, :, 2:34]
        x = (torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 255 - 0.5) / 0.2
        with torch.inference_mode():
            times = student.extractor.encoder.embed_times(x)[0].numpy()
        for k in range(start, min(start + 4 * spec.sampling_rate, len(frames))):
            found[k].append(times[(k - start) // (2 * spec.sampling_rate)])
    return np.stack([np.mean(values, axis=0) for values in found])


@pytest.mark.parametrize(
    ("count", "rate", "stride", "batch"), [(23, 1, 3, 4), (4, 1, 3, 8), (21, 2, 5, 1), (20, 1, 4, 2)]
)
def test_features_are_the_means_over_the_windows(student: Student, count: int, rate: int, stride: int, batch: int):
    frames, spec = make_frames(count), WindowSpec(4, rate, stride)
    parts = list(VideoEncoder(student, spec, batch_size=batch).encode("v", iter(frames), [(0, TO_END)]))
    assert [first for first, _ in parts] == [0, *np.cumsum([len(x) for _, x in parts])[:-1]]
    np.testing.assert_allclose(np.concatenate([x for _, x in parts]), expected(student, frames, spec), atol=1e-5)


def test_ranges_have_the_features_of_the_whole_video_and_other_frames_are_not_encoded(
    student: Student, monkeypatch: pytest.MonkeyPatch
):
    frames, spec = make_frames(60), WindowSpec(4, 1, 3)
    encoder, whole = VideoEncoder(student, spec, batch_size=3), expected(student, frames, spec)
    count = 0
    encode = encoder._encode_block

    def count_windows(block):
        nonlocal count
        count += len(block.starts)
        return encode(block)

    monkeypatch.setattr(encoder, "_encode_block", count_windows)
    ranges = [(5, 8), (30, 33), (34, 35)]
    found = {}
    for first, x in encoder.encode("v", iter(frames[: 35 + spec.span]), ranges):
        found |= {first + k: row for k, row in enumerate(x)}
    for first, end in ranges:
        np.testing.assert_allclose([found[k] for k in range(first, end)], whole[first:end], atol=1e-5)
    assert count == sum(any(a < s + 4 and s < b for a, b in ranges) for s in spec.starts(60))


def test_a_video_shorter_than_a_window_is_named(student: Student):
    with pytest.raises(FewshotError, match=r"v: has 3 frames, fewer than the 4 of a window"):
        list(VideoEncoder(student, WindowSpec(4)).encode("v", make_frames(3), [(0, TO_END)]))


def test_the_checkpoint_gives_the_sampling_rate_and_must_have_an_rgb_encoder(tmp_path: Path):
    config = {"data_module": {"sampling_rate": 2, "frame_size": [40, 48]}}
    encoder = load_video_encoder(str(tiny_data.write_teacher(tmp_path / "rgb", "rgb", 0, config=config)), stride=2)
    assert (encoder.windows, encoder.frame_size) == (WindowSpec(4, 2, 2), (40, 48))
    with pytest.raises(CheckpointError, match="encoder has the modality flow, but frames need rgb"):
        load_video_encoder(str(tiny_data.write_teacher(tmp_path / "flow", "flow", 0)))
