"""Pretrainings of a few steps: skipped steps and checkpoints."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint.read import read_checkpoint
from mmdistill.config import PretrainConfig
from mmdistill.pretrain.trainer import PretrainTrainer, _weight_compat, pretrain
from tests.configs import pretrain_config
from tests.flops import count_flops
from tests.tiny_data import MODEL, make_tiny, overrides


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1))  # 12 clips


def _config(data: list[str], *more: str) -> PretrainConfig:
    fixed = ["modality=flow", "accelerator=cpu", "batch_size=2", "trainer.epochs=1"]
    return pretrain_config(*data, *MODEL, *fixed, *more)


def test_settings_of_the_weights_contain_those_that_no_shape_shows(data: list[str]) -> None:
    compat = _weight_compat(_config(data))
    assert {"heads", "pos_embed", "decoder", "mean", "std"} <= compat.keys()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_steps_do_not_prevent_a_resume(
    data: list[str], accumulate: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Adam's count of steps lags behind that of the engine. Under ZeRO the checkpoint is checked for such a lag."""
    original, num_batches = PretrainTrainer.losses, 0

    def nan_in_the_first_step(self: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal num_batches
        num_batches += 1
        loss, baseline = original(self, batch)
        return loss * (float("nan") if num_batches <= accumulate else 1.0), baseline

    monkeypatch.setattr(PretrainTrainer, "losses", nan_in_the_first_step)
    options = ["strategy=deepspeed_stage_1", "trainer.on_nonfinite=skip"]
    options.append(f"trainer.accumulate_grad_batches={accumulate}")
    first = pretrain(_config(data, *options), tmp_path)
    meta = read_checkpoint(first).meta
    assert (meta["step"], meta["skipped_steps"], meta["batch"]) == (6 // accumulate, 1, None)
    last = pretrain(_config(data, *options, "trainer.epochs=2", "resume=auto"), tmp_path)
    assert read_checkpoint(last).meta["step"] == 12 // accumulate


class _CountedError(Exception):
    """Ends a training after its first step; its arguments are FLOPs: those that torch has counted, of the formula."""


@pytest.mark.parametrize(
    "options",
    [[], ["decoder_mask_ratio=0.5", "trainer.activation_checkpointing=true", "data_module.mask_type=random"]],
)
def test_flops_are_those_of_a_step(
    data: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = PretrainTrainer.train_step

    def count_step(self: Any, batch: Any) -> None:
        raise _CountedError(count_flops(lambda: original(self, batch)), self.flops_per_clip * len(batch["index"]))

    monkeypatch.setattr(PretrainTrainer, "train_step", count_step)
    with pytest.raises(_CountedError) as caught:
        pretrain(_config(data, *options), tmp_path)
    counted, formula = caught.value.args
    assert counted == formula > 0


def test_trace_shows_the_parts_of_the_steps_and_changes_no_weight(data: list[str], tmp_path: Path) -> None:
    plain = pretrain(_config(data), tmp_path / "plain")
    traced = pretrain(_config(data, "trainer.profile=2"), tmp_path / "traced")
    weights, own_weights = (read_checkpoint(path).state_dict for path in (plain, traced))
    assert all(torch.equal(value, own_weights[name]) for name, value in weights.items())
    (path,) = (tmp_path / "traced").glob("trace-*")
    events = json.loads(path.read_bytes())["traceEvents"]
    ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    expected = dict.fromkeys(("wait for data", "transfer", "forward", "backward", "optimizer"), 2)
    assert {name: ranges[name] for name in expected} == expected
    assert path.name == "trace-steps=4-5.json"
    log = (tmp_path / "traced" / "run.log").read_text()
    assert f"trace of the steps 4 to 5: {path}; open it in" in log
    assert "GFLOP per step; matrix products reach" in log
    with (tmp_path / "traced" / "metrics.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["mfu_percent"]) > 0
