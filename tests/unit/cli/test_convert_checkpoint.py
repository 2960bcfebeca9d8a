from pathlib import Path

import pytest

from mmdistill.checkpoint import read_checkpoint
from mmdistill.cli.convert_checkpoint import main
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME


def test_target_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(FIXTURES / "plain" / "bare.pt")
    assert main([source, "w.safetensors"]) == 0
    assert capsys.readouterr().out == "wrote w.safetensors\n"
    assert sorted(read_checkpoint("w.safetensors").state_dict) == sorted(read_checkpoint(source).state_dict)
    assert main([source, "w.safetensors"]) == 2
    assert "exists; choose another name, or use --force" in capsys.readouterr().err
    assert main([source, "w.safetensors", "--force"]) == 0


def test_training_state_for_other_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(FIXTURES / "zero3-w2-fp32" / NAME), tmp_path / "epoch=01"
    assert main([source, str(target), "--stage", "1", "--world-size", "3"]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert len(list((target / "checkpoint").glob("zero_pp_rank_*_optim_states.pt"))) == 3
    assert main([source, str(target), "--world-size", "0"]) == 2
    assert main([source, str(tmp_path / "w.safetensors"), "--stage", "0"]) == 2
    assert "use a name without .safetensors" in capsys.readouterr().err
