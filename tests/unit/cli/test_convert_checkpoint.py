from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, load_encoder, load_encoder_for_clips, read_checkpoint
from mmdistill.cli.convert_checkpoint import main
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME


def test_heads_that_tensors_do_not_determine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file with stated heads can be used by all commands, with clips of any size."""
    config = EncoderConfig(3, 4, 8, 12, 4, 2, 20, 2, 2, 10, 32)
    source, target = str(tmp_path / "other.pth"), str(tmp_path / "new.safetensors")
    torch.save({"model": {f"encoder.{k}": v for k, v in Encoder(config).state_dict().items()}}, source)
    with pytest.raises(CheckpointError, match=r"convert FILE NEW\.safetensors --heads=N"):
        load_encoder(source)
    assert main([source, target, "--heads", "3"]) == 2
    assert f"{source}: the attention width 20 is not a multiple of heads=3" in capsys.readouterr().err
    assert main([source, target, "--heads=2", "--decoder-heads=2"]) == 0
    encoder = load_encoder_for_clips(read_checkpoint(target), num_frames=4, token_grid=(2, 3))
    assert encoder.config == config
    assert main([target, str(tmp_path / "copy.pt")]) == 0
    assert load_encoder(tmp_path / "copy.pt").config.heads == 2


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
    assert main([source, f"{target}0", "--world-size", "0"]) == 2
    assert "ZeRO world size 0: use a stage of 0 to 3 and a world size of at least 1" in capsys.readouterr().err
    assert main([source, str(tmp_path / "w.safetensors"), "--stage", "0"]) == 2
    assert "use a name without .safetensors" in capsys.readouterr().err
