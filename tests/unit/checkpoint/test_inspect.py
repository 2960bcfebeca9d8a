from dataclasses import fields
from pathlib import Path

import pytest

from mmdistill.checkpoint import CheckpointError, save_torch
from mmdistill.checkpoint.convert import convert_checkpoint
from mmdistill.checkpoint.inspect import inspect_checkpoint
from mmdistill.cli.inspect_checkpoint import format_report
from mmdistill.models.videomae import EncoderConfig
from tests.checkpoint_files import STATE, write_distilled, write_native
from tests.unit.checkpoint.make_fixtures import FIXTURES


def test_report_of_each_format(tmp_path: Path) -> None:
    report = inspect_checkpoint(FIXTURES / "zero2-w2-bf16" / "epoch=01-loss=0.5000")
    assert (report["format"], report["stage"], report["world_size"], report["complete"]) == ("deepspeed", 2, 2, True)
    assert report["components"]["encoder"] == {"tensors": 17, "parameters": 1384}
    assert report["missing"] == ["manifest.json (checksums)", "meta.json (architecture and statistics)"]
    write_distilled(tmp_path / "last.ckpt")
    report = inspect_checkpoint(tmp_path / "last.ckpt")
    assert (report["kind"], report["epoch"], report["step"], report["missing"]) == ("distill", 3, 40, [])
    assert report["architecture"]["student_rgb"]["heads"] == 4
    data = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(data[: len(data) // 2])
    report = inspect_checkpoint(tmp_path / "last.ckpt")
    assert not report["complete"]
    assert "truncated" in report["problem"]


def test_the_architecture_has_the_same_order_in_each_format(tmp_path: Path) -> None:
    """The header of a safetensors file sorts the keys."""
    write_distilled(tmp_path / "last.ckpt")
    convert_checkpoint(tmp_path / "last.ckpt", tmp_path / "w.safetensors")
    for name in ("last.ckpt", "w.safetensors"):
        architecture = inspect_checkpoint(tmp_path / name)["architecture"]["student_rgb"]
        assert list(architecture) == [field.name for field in fields(EncoderConfig)]


def test_encoder_without_metadata_is_described_by_its_tensors() -> None:
    report = inspect_checkpoint(FIXTURES / "plain" / "free_width_sincos.pth")
    assert report["architecture"]["encoder"]["heads"] == 3
    assert "encoder: 3 heads of 5 inferred from the attention width 15" in report["notes"]
    assert report["missing"] == ["metadata (architecture and statistics)"]
    notes = inspect_checkpoint(FIXTURES / "plain" / "bare.pt")["notes"]
    assert any(note.startswith("decoder: the number of heads cannot be inferred") for note in notes)


def test_teachers_of_a_student_only_checkpoint_are_listed(tmp_path: Path) -> None:
    meta = {"encoders": {}, "teachers": {"teacher_flow": {"path": "/flow", "sha256": "ab12"}}}
    save_torch({"state_dict": STATE, "pytorch-lightning_version": "2", "mmdistill": meta}, tmp_path / "s.ckpt")
    (line,) = inspect_checkpoint(tmp_path / "s.ckpt")["missing"]
    assert line == "teacher_flow (a student-only checkpoint references it: /flow, sha256 of its encoder ab12)"


def test_labeled_sources_are_listed(tmp_path: Path) -> None:
    """Those of a teacher and of the initial student; the text names dataset and number of classes."""
    first, second = (
        {"dataset": name, "label_fields": None, "classes": list("abc"[:n])} for name, n in (("x", 3), ("y", 1))
    )
    teachers = {"teacher_flow": {"path": "/flow", "sha256": "ab12", "sources": [first]}}
    meta = {"encoders": {}, "teachers": teachers, "labeled_sources": [second, first]}
    save_torch({"state_dict": STATE, "pytorch-lightning_version": "2", "mmdistill": meta}, tmp_path / "s.ckpt")
    report = inspect_checkpoint(tmp_path / "s.ckpt")
    assert report["labeled_sources"] == [{"dataset": "x", "classes": 3}, {"dataset": "y", "classes": 1}]
    lines = format_report(report)
    assert "  labels        of 3 classes of the source x were used" in lines
    assert "  labels        of 1 class of the source y were used" in lines


def test_size_counts_all_files_and_damaged_shards_are_reported(tmp_path: Path) -> None:
    root = write_native(tmp_path / "d")
    report = inspect_checkpoint(root, full=True)
    assert report["complete"]
    assert report["size"] == sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    (root / "latest").write_text("checkpoinT")
    report = inspect_checkpoint(root)
    assert not report["complete"]
    assert "latest" in report["problem"]
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect_checkpoint(tmp_path / "absent")
