import json
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import save_safetensors
from mmdistill.cli.inspect_checkpoint import main
from tests.checkpoint_files import write_output
from tests.unit.checkpoint.make_fixtures import FIXTURES

SOURCE = str(FIXTURES / "lightning" / "epoch=00-train_loss=0.5000.ckpt")


def test_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([SOURCE]) == 0
    text = capsys.readouterr().out
    assert "component     student_rgb: 17 tensors" in text
    assert text.endswith("complete      yes\n")
    assert main([SOURCE, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "distill"


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "x.ckpt").write_bytes(Path(SOURCE).read_bytes()[:-9])
    assert main([str(tmp_path / "x.ckpt")]) == 1
    assert "complete      NO: " in capsys.readouterr().out


def test_other_file_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("text")
    assert main([str(tmp_path / "README.md")]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "README.md: not a known checkpoint format; expected" in shown.err


def test_run_folder_is_reported_with_its_newest_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_output(tmp_path) / "2026-01-10/12-30-45/mmdistill_tennis"
    assert main([str(run)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"mmdistill inspect: error: {run}: a run folder, not a checkpoint; ")
    assert Path(shown.split()[-1]).parent == run / "checkpoints"
    assert shown.split()[-3:-1] == ["mmdistill", "inspect"]
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert main([str(tmp_path / "empty")]) == 2
    assert "a run folder without a complete checkpoint" in capsys.readouterr().err


def test_folder_of_runs_names_the_command_that_lists_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = write_output(tmp_path / "my output")
    assert main([str(output)]) == 2
    assert capsys.readouterr().err == (
        f"mmdistill inspect: error: {output}: a folder with 8 checkpoints of 4 runs, not a checkpoint; "
        f"to list checkpoints: mmdistill find-checkpoints '{output}'\n"
    )


def test_text_names_safetensors_and_rounds_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "w.safetensors", {"loss": 0.12345678})
    assert main([str(tmp_path / "w.safetensors")]) == 0
    text = capsys.readouterr().out
    assert "  format        safetensors\n" in text
    assert "  loss          0.1235\n" in text
