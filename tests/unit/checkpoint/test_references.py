import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import Checkpoint, CheckpointError, load_encoder, open_checkpoint, save_torch
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.references import (
    load_referenced_teacher,
    require_exists,
    require_same_digest,
    weights_digest,
)
from mmdistill.models.videomae import Encoder
from tests.contracts.checkpoint_contract import CONFIG, META, make_encoder, state_of


def student_only(path: Path, **encoders: Any) -> Checkpoint:
    reference = {"path": str(path), "sha256": weights_digest(make_encoder(0))}
    meta = {"teachers": {"teacher_rgb": reference}, "encoders": encoders}
    student = {f"student_rgb.{name}": tensor for name, tensor in state_of(make_encoder(1)).items()}
    source = path.with_name("s.ckpt")
    save_torch({"state_dict": student, "mmdistill": meta}, source)
    return open_checkpoint(source)


def test_referenced_teacher_is_read(tmp_path: Path) -> None:
    write_deepspeed(state_of(make_encoder(0)), tmp_path / "rgb", META)
    teacher = load_encoder(load_referenced_teacher(student_only(tmp_path / "rgb"), "teacher_rgb"))
    assert weights_digest(teacher) == weights_digest(make_encoder(0))


def test_teacher_without_metadata_gets_the_stored_input_size(tmp_path: Path) -> None:
    wide = Encoder(dataclasses.replace(CONFIG, dim=384, heads=6, head_dim=64))
    torch.save({"model": state_of(wide)}, tmp_path / "rgb.pt")
    size = {"num_frames": 4, "height": 8, "width": 12}
    encoder = load_encoder(open_checkpoint(tmp_path / "rgb.pt"), **size)
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


def test_digest_is_the_sha256_of_config_values_and_tensors() -> None:
    """The fields added later are not part of it at their defaults: earlier digests remain valid."""
    encoder = make_encoder(0)
    fields = dataclasses.asdict(CONFIG)
    assert (fields.pop("final_norm"), fields.pop("layer_norm_eps")) == (True, 1e-6)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert weights_digest(encoder) == digest.hexdigest()


def test_digest_does_not_depend_on_class_names() -> None:
    """Student-only checkpoints store it, and must find their teachers after a class was renamed."""
    expected, encoder = weights_digest(make_encoder(0)), make_encoder(0)
    renamed = dataclasses.make_dataclass("Renamed", [(f.name, f.type) for f in dataclasses.fields(CONFIG)], frozen=True)
    encoder.config = renamed(**dataclasses.asdict(CONFIG))
    encoder.__class__ = type("RenamedEncoder", (Encoder,), {})
    assert weights_digest(encoder) == expected


def test_digest_depends_on_values_dtypes_and_settings_without_a_tensor() -> None:
    digests = [weights_digest(make_encoder(0)), weights_digest(make_encoder(0).bfloat16())]
    other_eps = Encoder(dataclasses.replace(CONFIG, layer_norm_eps=1e-12))
    other_eps.load_state_dict(make_encoder(0).state_dict())
    digests.append(weights_digest(other_eps))
    other_heads = Encoder(dataclasses.replace(CONFIG, heads=1, head_dim=16))
    other_heads.load_state_dict(make_encoder(0).state_dict())  # the same shapes
    digests.append(weights_digest(other_heads))
    changed = make_encoder(0)
    changed.norm.bias.data[3] += 1e-6
    digests.append(weights_digest(changed))
    assert len(set(digests)) == 5


def test_module_without_config_has_a_digest() -> None:
    assert weights_digest(torch.nn.Linear(2, 2)) != weights_digest(torch.nn.Linear(2, 2))
