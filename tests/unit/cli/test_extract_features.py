import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.cli.extract_features import main, parse_arguments
from mmdistill.data.clips import ClipSource
from mmdistill.fewshot.features import load_features
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.tiny_data import make_tiny, overrides

pytestmark = pytest.mark.usefixtures("single_process_env")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return [o for o in overrides(make_tiny(tmp_path / "data", per_class=2)) if not o.startswith("trainer")]


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights of a student and a teacher, saved as ``a=b.ckpt``."""
    state = {}
    for seed, (component, channels) in enumerate((("student_rgb", 3), ("teacher_flow", 2))):
        torch.manual_seed(seed)
        config = EncoderConfig(channels, 4, 32, 32, 8, 2, dim=64, depth=1, heads=1, head_dim=64, mlp_dim=64)
        state |= {f"{component}.encoder.{k}": v for k, v in Encoder(config).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "a=b.ckpt")
    return state


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.usefixtures("weights")
def test_a_component_is_selected_and_clips_are_masked(tmp_path: Path, options: list[str]):
    selected = ["--component", "teacher_flow", "--n-masks", 2]
    assert run(tmp_path / "a=b.ckpt", tmp_path / "flow.npz", *selected, *options) == 0
    flow = load_features(tmp_path / "flow.npz")
    assert flow.features.shape == (8, 2, 64)
    assert flow.network == "teacher_flow"
    assert flow.input_mode == "2 tube masks, 75% removed, shared"
    assert len(flow.classes) == 4
    assert flow.groups[0] == "rally_CC_0"
    assert flow.sources[0] == ClipSource("rally_CC_0", "near_deuce_stroke_fh_gs_CC_-_in")


@pytest.mark.parametrize("given", [["f.npz"], ["--output", "f.npz"], ["a=1", "--output=f.npz"]])
def test_output_is_an_option_or_the_second_path(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = parse_arguments(["x.ckpt", *given, "b=2"])
    assert args.output == Path("f.npz")
    assert args.overrides[-1] == "b=2"
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["x.ckpt", "b=2"])
    assert "missing argument: --output (file to write" in capsys.readouterr().err


@pytest.mark.usefixtures("weights")
def test_training_clips_are_selected_and_have_no_label(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for split, noun in (("unlabel", "training"), ("eval", "evaluation")):
        assert run(tmp_path / "a=b.ckpt", tmp_path / "x.npz", "--split", split, *options) == 0
        found[split] = load_features(tmp_path / "x.npz")
        assert f"{len(found[split].ids)} {noun} clips" in capsys.readouterr().err
    assert set(found["unlabel"].labels) == {-1}
    assert -1 not in found["eval"].labels
    assert len(found["unlabel"].ids) > len(found["eval"].ids)  # windows and events


@pytest.mark.usefixtures("weights")
def test_the_clip_length_may_differ_from_the_config(tmp_path: Path, options: list[str]):
    assert run(tmp_path / "a=b.ckpt", tmp_path / "x.npz", *options, "data_module.num_frames=8") == 0
    assert load_features(tmp_path / "x.npz").network == "student_rgb"


def test_nan_weights_exit_with_status_2_and_write_nothing(
    tmp_path: Path, options: list[str], weights: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
):
    weights["student_rgb.encoder.norm.weight"].fill_(float("nan"))
    torch.save({"state_dict": weights}, tmp_path / "nan.ckpt")
    assert run(tmp_path / "nan.ckpt", tmp_path / "nan.safetensors", *options) == 2
    assert "mmdistill features: error: student_rgb: NaN or infinite features of 8 of 8 clips" in capsys.readouterr().err
    assert not (tmp_path / "nan.safetensors").exists()


@pytest.mark.usefixtures("weights")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.npz", "data_module.n_wya=3"], "n_wya"),
        (["x.csv"], r"x\.csv: unsupported file type; use a name that ends in \.npz or \.safetensors"),
        (
            ["x.npz", "--component", "teacher_skeleton"],
            "--component: .*'teacher_skeleton'; select one of student_rgb",
        ),
    ],
)
def test_invalid_arguments_exit_with_status_2(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert run(tmp_path / "a=b.ckpt", *arguments, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmdistill features: error: ")
    assert re.search(message, error)


@pytest.mark.usefixtures("weights")
def test_per_frame_features_are_one_file_per_rally(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "frames"
    arguments = [tmp_path / "a=b.ckpt", folder, "--per-frame", "--stride", 2, *options]
    assert run(*arguments) == 0
    assert "student_rgb, 8 rallies, 40 windows encoded" in capsys.readouterr().out  # starts 0, 2, 4, 6, 8
    assert np.load(folder / "rally_CC_0.npy").shape == (12, 64)
    assert len(list(folder.glob("*.npy"))) == 8
    assert run(*arguments) == 0
    assert "0 windows encoded" in capsys.readouterr().out
    assert run(tmp_path / "a=b.ckpt", folder, "--per-frame", "--stride", 5, *options) == 2
    assert "stride=5 must lie between 1 and 4" in capsys.readouterr().err
