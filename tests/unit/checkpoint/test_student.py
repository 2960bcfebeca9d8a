"""`load_student`: from frames to the features of the evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import mmdistill
from mmdistill import load_student
from mmdistill.checkpoint import CheckpointError, open_checkpoint, save_torch
from mmdistill.checkpoint.export import export_student
from mmdistill.checkpoint.student import find_statistics
from mmdistill.fewshot.encode import ClipEncoder
from mmdistill.modalities import get_modality
from tests.checkpoint_files import write_distilled
from tests.contracts.checkpoint_contract import META, make_encoder, state_of

MEAN, STD = 0.5, 0.2  # in the metadata that `write_distilled` writes


def random_frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def set_frame_size(path: Path, size: list[int]) -> None:
    content = torch.load(path, weights_only=True)
    content["mmdistill"]["config"] = {"data_module": {"frame_size": size}}
    save_torch(content, path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_distilled(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_features_are_those_of_the_evaluation(tmp_path: Path) -> None:
    """Stored frames of 10 x 17 px, of which the evaluation crops the center, 8 x 12."""
    student = write_distilled(tmp_path / "last.ckpt")
    set_frame_size(tmp_path / "last.ckpt", [10, 17])
    frames = random_frames(2, 4, 10, 17)
    encode = ClipEncoder(student, get_modality("rgb").spec(mean=(MEAN,), std=(STD,)))
    crop_box = torch.tensor([[1.0, 2.0, 8.0, 12.0, 0.0]] * 2)
    with torch.inference_mode():
        expected = encode({"rgb": torch.from_numpy(frames), "crop_box": crop_box}, None)
    load = load_student(tmp_path / "last.ckpt")
    torch.testing.assert_close(load(frames), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(frames[1]), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(torch.from_numpy(frames)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load(frames[:, :, 1:9, 2:14]), expected, rtol=1e-5, atol=1e-5)


def test_squashed_features_are_those_of_the_evaluation(tmp_path: Path) -> None:
    """The whole frame of 10 x 17 px becomes the input of 8 x 12; also of an export, and of frames of another size."""
    student = write_distilled(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["mmdistill"]["config"] = {"data_module": {"frame_size": [10, 17], "resize": "squash"}}
    save_torch(content, tmp_path / "last.ckpt")
    frames = random_frames(2, 4, 10, 17)
    # bilinear interpolation at pixel centers, written out
    ys, xs = ((np.arange(n) + 0.5) * size / n - 0.5 for n, size in ((8, 10), (12, 17)))
    y0, x0 = np.floor(ys).astype(int).clip(0), np.floor(xs).astype(int).clip(0)
    y1, x1 = (y0 + 1).clip(max=9), (x0 + 1).clip(max=16)
    wy, wx = (ys - y0).clip(0)[:, None, None], (xs - x0).clip(0)[:, None]
    f = frames.astype(np.float64)
    rows = f[:, :, y0] * (1 - wy) + f[:, :, y1] * wy
    squashed = torch.from_numpy(rows[:, :, :, x0] * (1 - wx) + rows[:, :, :, x1] * wx).float()
    x = (squashed.permute(0, 4, 1, 2, 3) / 255 - MEAN) / STD
    with torch.inference_mode():
        expected = student.embed(x)
    load = load_student(tmp_path / "last.ckpt")
    torch.testing.assert_close(load(frames), expected, rtol=1e-4, atol=1e-4)
    exported = load_student(export_student(tmp_path / "last.ckpt", tmp_path / "student", to="hf"))
    torch.testing.assert_close(exported(frames), expected, rtol=1e-4, atol=1e-4)
    larger = frames.repeat(4, axis=2).repeat(2, axis=3)  # another aspect ratio
    assert (load(larger) - expected).abs().max() < 0.5 * (load(frames[:, :, ::-1].copy()) - expected).abs().max()
    processor = json.loads((tmp_path / "student" / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["do_center_crop"]) == ({"height": 8, "width": 12}, False)


def test_student_states_what_it_needs_and_returns(checkpoint: Path) -> None:
    student = load_student(checkpoint)
    assert (student.num_frames, student.frame_size, student.width) == (4, (8, 12), 16)
    assert repr(student) == "Student(num_frames=4, frame_size=(8, 12), width=16)"


def test_larger_frames_are_scaled_and_cropped(checkpoint: Path) -> None:
    """Also portrait frames; a scaled ramp is closer to the small ramp than to its mirror image."""
    load = load_student(checkpoint)
    gray = np.full((4, 32, 96, 3), 90, np.uint8)
    small = np.full((4, 8, 12, 3), 90, np.uint8)
    torch.testing.assert_close(load(gray), load(small), rtol=1e-5, atol=1e-5)
    sides = gray.copy()
    sides[:, :, :20] = sides[:, :, -20:] = 255  # outside the center crop of 32 x 48
    torch.testing.assert_close(load(sides), load(small), rtol=1e-5, atol=1e-5)
    assert load(gray[:, :, :24]).shape == (16,)  # portrait
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8)[None, None, :, None] * 20, (4, 8, 12, 3))
    wide = load(np.repeat(np.repeat(ramp, 4, axis=1), 4, axis=2).copy())
    assert (wide - load(ramp.copy())).abs().max() < 0.3 * (wide - load(ramp[:, :, ::-1].copy())).abs().max()


@pytest.mark.parametrize("to", ["safetensors", "hf"])
def test_exports_are_read_as_well(checkpoint: Path, tmp_path: Path, to: str) -> None:
    set_frame_size(checkpoint, [10, 17])
    target = export_student(checkpoint, tmp_path / "student.safetensors", to=to)
    assert load_student(target).frame_size == (10, 17)
    frames = random_frames(4, 10, 17)
    torch.testing.assert_close(load_student(target)(frames), load_student(checkpoint)(frames))


def test_frames_that_do_not_fit_are_errors(checkpoint: Path) -> None:
    load = load_student(checkpoint)
    for frames, message in (
        (random_frames(5, 8, 12), "expected 4 frames, got 5; select 4 of them"),
        (random_frames(4, 8, 12) / np.float32(255), "expected uint8 frames"),
        (random_frames(4, 8, 12)[..., :2], "expected uint8 frames"),
        (random_frames(8, 12), "expected uint8 frames"),
    ):
        with pytest.raises(ValueError, match=message):
            load(frames)


def test_encoders_of_other_modalities_and_unknown_statistics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = make_encoder(0)
    save_torch({"model": state_of(encoder), "mmdistill": {**META, "modality": "flow"}}, tmp_path / "flow.pt")
    with pytest.raises(
        CheckpointError, match=r"flow\.pt: encoder has the modality flow, but frames need rgb; give an rgb checkpoint"
    ):
        load_student(tmp_path / "flow.pt")
    save_torch({"model": state_of(encoder), "mmdistill": {"encoders": META["encoders"]}}, tmp_path / "rgb.pt")
    assert load_student(tmp_path / "rgb.pt").extractor.mean == get_modality("rgb").mean
    assert "has no mean and std; those of ImageNet are used" in caplog.text


def test_compensated_flow_is_an_error(tmp_path: Path) -> None:
    """An exported encoder would not subtract the median of each frame."""
    statistics = {"flow": {"mean": [0.0], "std": [1.0], "compensate": "median"}}
    meta = {**META, "modality": "flow", "statistics": statistics}
    save_torch({"model": state_of(make_encoder(0)), "mmdistill": meta}, tmp_path / "flow.pt")
    with pytest.raises(
        CheckpointError, match=r"flow\.pt was trained with .*flow\.compensate=median, which an exported"
    ):
        find_statistics(open_checkpoint(tmp_path / "flow.pt"), "flow")


def test_other_names_of_the_package_are_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_teacher'"):
        mmdistill.load_teacher  # noqa: B018
