"""The command ``mmdistill spot``."""

import json
from pathlib import Path

import pytest
import torch

from mmdistill.cli.spot import main
from mmdistill.data.annotations import load_annotations
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.tiny_data import make_tiny, overrides

pytestmark = pytest.mark.usefixtures("single_process_env")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A student checkpoint and the tiny data."""
    torch.manual_seed(0)
    config = EncoderConfig(3, 4, 32, 32, 8, 2, dim=64, depth=1, heads=1, head_dim=64, mlp_dim=64)
    state = {f"student_rgb.encoder.{k}": v for k, v in Encoder(config).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    options = [o for o in overrides(make_tiny(tmp_path / "data", per_class=2)) if not o.startswith("trainer")]
    return [str(tmp_path / "last.ckpt"), "--output", str(tmp_path / "out"), *options, "baselines=[random]"]


def test_metrics_and_events_are_written(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*arguments, "--shots", "4", "--draws", "2"]) == 0
    out = capsys.readouterr().out
    assert "4 labeled rallies, 2 draws" in out
    assert "Δ random" in out
    found = json.loads((tmp_path / "out" / "spotting.json").read_text())
    assert set(found["networks"]) == set(found["values"]) == {"student_rgb", "random"}
    assert [len(videos) for videos in found["labeled"]] == [4, 4]
    assert 0 <= found["networks"]["student_rgb"]["f1_strict@1/event"]["mean"] <= 100
    predicted = {rally.video for rally in load_annotations(tmp_path / "out" / "predictions.json")}
    assert len(predicted) == 4
    assert predicted.isdisjoint(found["labeled"][0])


def test_named_rallies_are_used(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*arguments, "--rallies", "rally_CC_0", "rally_T_1"]) == 0
    assert json.loads((tmp_path / "out" / "spotting.json").read_text())["labeled"] == [["rally_CC_0", "rally_T_1"]]
    assert "2 labeled rallies, 1 draw" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rallies", "rally_CC_9"], "no labeled rally rally_CC_9"),
        (["--shots", "8"], "select between 1 and 7"),
        (["--stride", "9"], "stride=9 must lie between 1 and 4"),
    ],
)
def test_impossible_draws_are_one_line(
    arguments: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main([*arguments, *more]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
