from pathlib import Path

import pytest

from mmdistill.checkpoint import read_checkpoint
from mmdistill.cli.export_student import main
from tests.checkpoint_files import write_distilled
from tests.unit.checkpoint.make_fixtures import FIXTURES


def test_default_name_and_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_distilled(tmp_path / "last.ckpt")
    assert main(["last.ckpt", "--to", "safetensors", "--component", "teacher_rgb"]) == 0
    assert capsys.readouterr().out == "wrote student.safetensors\n"
    assert read_checkpoint("student.safetensors").meta["component"] == "teacher_rgb"
    assert main(["last.ckpt", "--to", "hf"]) == 0
    assert capsys.readouterr().out == "wrote student-hf\n"


def test_unsupported_architecture_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(FIXTURES / "plain" / "free_width_sincos.pth")
    assert main([source, "--to", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert "heads" in capsys.readouterr().err


def test_an_unknown_component_is_an_error_about_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_distilled(tmp_path / "last.ckpt")
    out = str(tmp_path / "w.safetensors")
    assert main([str(tmp_path / "last.ckpt"), "--to", "safetensors", "--component", "student", "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mmdistill export: error: --component: {tmp_path}/last.ckpt: no component 'student'; ")
    assert "part" not in error.replace(str(tmp_path), "")
