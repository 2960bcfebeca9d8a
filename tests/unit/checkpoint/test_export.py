import dataclasses
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, export, load_encoder, read_checkpoint
from mmdistill.checkpoint.export import export_student, make_huggingface_config
from mmdistill.checkpoint.formats.names import EXPORT_SUFFIXES
from mmdistill.models.videomae import Encoder
from tests.checkpoint_files import STUDENT_CONFIG, write_distilled
from tests.unit.checkpoint.make_fixtures import FIXTURES


def test_export_safetensors_is_the_student_alone(tmp_path: Path) -> None:
    student = write_distilled(tmp_path / "last.ckpt")
    path = export_student(tmp_path / "last.ckpt", tmp_path / "s.safetensors", to="safetensors")
    checkpoint = read_checkpoint(path)
    assert checkpoint.components == ["encoder"]
    assert checkpoint.meta["statistics"] == {"rgb": {"mean": [0.5], "std": [0.2]}}
    x = torch.randn(2, 3, 4, 8, 12)
    assert torch.equal(load_encoder(path).embed(x), student.embed(x))


def test_another_component_is_exported_with_its_modality(tmp_path: Path) -> None:
    write_distilled(tmp_path / "last.ckpt")
    source = read_checkpoint(tmp_path / "last.ckpt")
    path = export_student(tmp_path / "last.ckpt", tmp_path / "t.safetensors", to="safetensors", component="teacher_rgb")
    checkpoint = read_checkpoint(path)
    assert (checkpoint.meta["component"], checkpoint.meta["modality"]) == ("teacher_rgb", "rgb")
    for name, tensor in checkpoint.state_dict.items():
        assert torch.equal(tensor, source.state_dict[f"teacher_rgb.{name}"])


def test_huggingface_folder_is_read_back(tmp_path: Path) -> None:
    student = write_distilled(tmp_path / "last.ckpt")
    back = load_encoder(export_student(tmp_path / "last.ckpt", tmp_path / "hf", to="hf"))
    assert back.config == STUDENT_CONFIG
    assert all(torch.equal(tensor, student.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize(
    ("pos_embed", "message"),
    [("learned", "has learned positions"), ("sincos_separable", r"has positions separable in \(t, h, w\)")],
)
def test_huggingface_config_needs_fixed_positions(pos_embed: str, message: str) -> None:
    config = dataclasses.replace(STUDENT_CONFIG, pos_embed=pos_embed)
    with pytest.raises(CheckpointError, match=message):
        make_huggingface_config(Encoder(config))


def test_huggingface_does_not_support_other_attention_widths(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="3 heads of 5 in a width of 16"):
        export_student(FIXTURES / "plain" / "free_width_sincos.pth", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_onnx_file_of_two_gib_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    write_distilled(tmp_path / "last.ckpt")
    monkeypatch.setattr(export, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"s\.onnx: not written: one ONNX file holds less than 2 GiB; use --to"):
        export_student(tmp_path / "last.ckpt", tmp_path / "s.onnx", to="onnx")


@pytest.mark.parametrize("to", list(EXPORT_SUFFIXES))
@pytest.mark.parametrize("suffix", ["", *filter(None, EXPORT_SUFFIXES.values()), ".v2"])
def test_suffix_is_added_or_that_of_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, suffix: str
) -> None:
    write_distilled(tmp_path / "last.ckpt")
    monkeypatch.setitem(export._WRITERS, to, lambda _, target: target.touch())
    own = EXPORT_SUFFIXES[to]
    if to == "hf" or suffix in ("", own):
        written = export_student(tmp_path / "last.ckpt", tmp_path / f"name{suffix}", to=to)
        assert written == tmp_path / f"name{suffix if to == 'hf' else own}"
        assert written.exists()
        return
    with pytest.raises(CheckpointError, match=rf"name{suffix}: --to {to} writes a file that ends in {own}; choose"):
        export_student(tmp_path / "absent.ckpt", tmp_path / f"name{suffix}", to=to)


def test_existing_targets_and_unknown_formats_are_errors(tmp_path: Path) -> None:
    write_distilled(tmp_path / "last.ckpt")
    (tmp_path / "s.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="exists; choose another name, or use --force"):
        export_student(tmp_path / "last.ckpt", tmp_path / "s.safetensors", to="safetensors")
    export_student(tmp_path / "last.ckpt", tmp_path / "s.safetensors", to="safetensors", force=True)
    assert read_checkpoint(tmp_path / "s.safetensors").components == ["encoder"]
    with pytest.raises(CheckpointError, match="--to tflite: choose one of"):
        export_student(tmp_path / "last.ckpt", tmp_path / "s.tflite", to="tflite")
