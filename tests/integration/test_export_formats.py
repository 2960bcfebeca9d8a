"""Exported students give the same features in transformers, torch.export and onnxruntime."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, load_encoder
from mmdistill.checkpoint.export import export_student
from tests.checkpoint_files import STUDENT_CONFIG, write_distilled


def test_export_huggingface(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    student = write_distilled(tmp_path / "last.ckpt").eval()
    folder = export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf")
    theirs = transformers.VideoMAEModel.from_pretrained(folder).eval()
    x = torch.randn(2, 3, 4, 8, 12)
    with torch.no_grad():
        out = theirs(x.transpose(1, 2)).last_hidden_state
        torch.testing.assert_close(out, student(x), rtol=0, atol=1e-5)
    back = load_encoder(folder)
    assert back.config == STUDENT_CONFIG
    assert torch.equal(back.blocks[1].attn.qkv.weight, student.blocks[1].attn.qkv.weight)


def test_export_torch(tmp_path: Path) -> None:
    student = write_distilled(tmp_path / "last.ckpt").eval()
    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.pt2", to="torch_export")
    program = torch.export.load(path).module()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 8, 12)
        torch.testing.assert_close(program(x), student.embed(x), rtol=1e-5, atol=1e-5)


def test_export_onnx(tmp_path: Path) -> None:
    student = write_distilled(tmp_path / "last.ckpt").eval()
    if any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        if find_spec("onnx") is None:
            with pytest.raises(CheckpointError, match="ONNX export needs the packages onnx"):
                export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")
        pytest.skip("onnx, onnxscript and onnxruntime are not installed")
    import onnxruntime

    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 3):
        x = torch.randn(batch, 3, 4, 8, 12)
        out = torch.from_numpy(session.run(None, {"clip": x.numpy()})[0])
        torch.testing.assert_close(out, student.embed(x), rtol=0, atol=1e-4)
