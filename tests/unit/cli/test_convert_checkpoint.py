from pathlib import Path

import pytest

from mmdistill.checkpoint import read_checkpoint
from mmdistill.cli.convert_checkpoint import main
from tests.unit.checkpoint.make_fixtures import FIXTURES


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
