"""An evaluation uses the statistics stored with a network, and reports which rallies were in the training set."""

import json
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import load_torch, save_torch
from mmdistill.config import DistillConfig, modality_specs, to_plain
from mmdistill.distributed.device import resolve_precision
from mmdistill.evaluation.networks import load_network
from mmdistill.evaluation.run import evaluate_checkpoint
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.configs import distill_config
from tests.tiny_data import EVAL, make_tiny, overrides

SIGMA = "data_module.modalities.skeleton.sigma=0.4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data, and an encoder of skeletons that were drawn with another sigma than the config's."""
    make_tiny(tmp_path / "data")
    spec = modality_specs(_config(tmp_path, SIGMA).data_module)["skeleton"]
    torch.manual_seed(0)
    size = 32 // spec.input_stride
    geometry = EncoderConfig(spec.channels, 4, size, size, 8 // spec.input_stride, 2, 16, 2, 2, 8, 32)
    state = {f"encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
    meta = {"kind": "pretrain", "modality": "skeleton", "encoders": {"encoder": to_plain(geometry)}}
    with_statistics = {**meta, "statistics": {"skeleton": spec.statistics}}
    save_torch({"state_dict": state, "mmdistill": with_statistics}, tmp_path / "with_statistics.ckpt")
    save_torch({"state_dict": state, "mmdistill": meta}, tmp_path / "without_statistics.ckpt")
    return tmp_path


def _config(folder: Path, *more: str) -> DistillConfig:
    fixed = [
        "train=False",
        "ckpt_path=x",
        "accelerator=cpu",
        "baselines=[]",
        "classifier=centroid",
        "feature_cache=null",
    ]
    return distill_config(*overrides(folder / "data"), *EVAL, *fixed, *more)


def test_heatmaps_use_the_stored_sigma(folder: Path) -> None:
    def score(name: str, *more: str) -> list[float]:
        found = evaluate_checkpoint(_config(folder, *more), str(folder / name), folder / "run")
        return [row["top1_action_ensemble"] for row in found["settings"][0]["rows"].values()]  # one per input mode

    assert score("with_statistics.ckpt") == score("without_statistics.ckpt", SIGMA)
    assert score("with_statistics.ckpt") != score("without_statistics.ckpt")
    data = _config(folder).data_module
    spec = modality_specs(data)["skeleton"]
    assert spec.sigma == 2.0
    assert load_network(folder / "with_statistics.ckpt", data=data).spec(spec).sigma == 0.4


def test_report_states_sampling_rate_and_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = load_torch(folder / "with_statistics.ckpt")
    for rate, is_reported in ((2, True), (1, False)):
        content["mmdistill"]["config"] = {"data_module": {"sampling_rate": rate}}
        save_torch(content, folder / "rate.ckpt")
        capsys.readouterr()
        found = evaluate_checkpoint(_config(folder, "precision=auto"), str(folder / "rate.ckpt"), folder / "run")
        text = f"data_module.sampling_rate=1, but {folder / 'rate.ckpt'} was trained with {rate}"
        assert (text in capsys.readouterr().out) is is_reported
    assert found["config"]["precision"] == "auto"
    assert found["precision"] == resolve_precision("auto", torch.device("cpu"))


def test_report_counts_rallies_without_clips(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "data" / "val.json"
    rallies = json.loads(file.read_text())
    rallies[0]["num_frames"], rallies[0]["events"] = 4, []
    rallies[1]["events"] = []
    file.write_text(json.dumps(rallies))
    found = evaluate_checkpoint(_config(folder), str(folder / "with_statistics.ckpt"), folder / "run")
    assert (found["index"]["clips"], found["index"]["rallies"]) == (22, 24)
    assert found["index"]["too_short"] == [rallies[0]["video"]]
    assert found["index"]["without_events"] == [rallies[1]["video"]]
    message = "22 evaluation clips of 4 classes; skipping 1 rally too short for a clip, 1 rally without an event"
    assert message in capsys.readouterr().out
    assert f"<li>{message}</li>" in (folder / "run" / "report.html").read_text()


def test_report_counts_rallies_of_the_training_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, checkpoint = _config(folder), str(folder / "with_statistics.ckpt")
    file = folder / "data" / "unlabel.json"
    rallies = json.loads(file.read_text())

    def evaluate() -> tuple[int | None, str]:
        capsys.readouterr()
        count = evaluate_checkpoint(config, checkpoint, folder / "run")["rallies_in_training"]
        stored = json.loads((folder / "run" / "fewshot.json").read_text())["rallies_in_training"]
        assert stored == count
        return count, capsys.readouterr().out

    count, text = evaluate()
    assert count == 24
    assert "24 of 24 evaluated rallies are also in unlabel.json" in text
    file.write_text(json.dumps(rallies[:5]))
    assert evaluate()[0] == 5
    file.write_text(json.dumps([{**rallies[0], "video": "another"}]))
    count, text = evaluate()
    assert count == 0
    assert "evaluated rallies" not in text
    file.unlink()
    count, text = evaluate()
    assert count is None
    assert "cannot compare the evaluated rallies with the training file" in text
    assert "unlabel.json does not exist" in text
