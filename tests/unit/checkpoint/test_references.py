import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder, read_checkpoint
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.digest import weights_digest
from mmdistill.checkpoint.formats.names import CheckpointFormat
from mmdistill.checkpoint.references import load_referenced_teacher, require_exists, require_same_digest
from mmdistill.models.videomae import Encoder
from tests.contracts.checkpoint_contract import CONFIG, META, make_encoder, state_of


def student_only(path: Path, **encoders: Any) -> Checkpoint:
    reference = {"path": str(path), "sha256": weights_digest(make_encoder(0))}
    meta = {"teachers": {"teacher_rgb": reference}, "encoders": encoders}
    student = {f"student_rgb.{name}": tensor for name, tensor in state_of(make_encoder(1)).items()}
    return Checkpoint(path.with_name("s.ckpt"), CheckpointFormat.LIGHTNING, student, meta)


def test_referenced_teacher_is_read(tmp_path: Path) -> None:
    write_deepspeed(state_of(make_encoder(0)), tmp_path / "rgb", META)
    teacher = load_encoder(load_referenced_teacher(student_only(tmp_path / "rgb"), "teacher_rgb"))
    assert weights_digest(teacher) == weights_digest(make_encoder(0))


def test_teacher_without_metadata_gets_the_stored_input_size(tmp_path: Path) -> None:
    wide = Encoder(dataclasses.replace(CONFIG, dim=384, heads=6, head_dim=64))
    torch.save({"model": state_of(wide)}, tmp_path / "rgb.pt")
    size = {"num_frames": 4, "height": 8, "width": 12}
    encoder = load_encoder(read_checkpoint(tmp_path / "rgb.pt"), **size)
    source = student_only(tmp_path / "rgb.pt", teacher_rgb=size)
    source.meta["teachers"]["teacher_rgb"]["sha256"] = weights_digest(encoder)
    assert load_referenced_teacher(source, "teacher_rgb").components == ["encoder"]
    assert encoder.config.grid == CONFIG.grid


def test_missing_and_changed_teachers_are_errors(tmp_path: Path) -> None:
    source = student_only(tmp_path / "rgb")
    with pytest.raises(
        CheckpointError,
        match=r"s\.ckpt: no teacher_flow, neither in the file nor as a reference; use one of student_rgb",
    ):
        load_referenced_teacher(source, "teacher_flow")
    with pytest.raises(
        CheckpointError, match=r"rgb: does not exist; the student-only checkpoint .*s\.ckpt references it"
    ):
        load_referenced_teacher(source, "teacher_rgb")
    write_deepspeed(state_of(make_encoder(2)), tmp_path / "rgb", META)
    found, expected = weights_digest(make_encoder(2)), source.meta["teachers"]["teacher_rgb"]["sha256"]
    with pytest.raises(
        CheckpointError, match=f"the sha256 of its weights is {found}, .*teacher_rgb of sha256 {expected}"
    ):
        load_referenced_teacher(source, "teacher_rgb")


def test_checks_pass_silently(tmp_path: Path) -> None:
    reference = {"path": str(tmp_path), "sha256": "ab"}
    require_exists(str(tmp_path), "teacher_rgb", reference, "s.ckpt")
    require_same_digest(str(tmp_path), "ab", "teacher_rgb", reference, "s.ckpt")
