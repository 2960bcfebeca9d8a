"""The average of the encoder in a pretraining."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import CheckpointError, load_encoder
from mmdistill.config import PretrainConfig
from mmdistill.pretrain.average import check_average
from mmdistill.pretrain.trainer import PretrainTrainer, pretrain
from tests.configs import pretrain_config
from tests.tiny_data import MODEL, overrides


def _config(data: Path, *more: str) -> PretrainConfig:
    fixed = ["modality=flow", "accelerator=cpu", "batch_size=4", "trainer.lr=0.1", "trainer.image_every_n_epochs=0"]
    return pretrain_config(*overrides(data), *MODEL, *fixed, *more)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_average_is_that_of_the_formula(
    tiny_clips: Path, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """average = 0.75 * average + 0.25 * weights after each step, from the initial weights on, in float32."""
    weights: list[dict[str, torch.Tensor]] = []
    original = PretrainTrainer.optimizer_step

    def record(self: Any, *, is_last: bool) -> None:
        if not weights:
            weights.append({k: v.float().clone() for k, v in self.engine.module.encoder.state_dict().items()})
        original(self, is_last=is_last)
        weights.append({k: v.float().clone() for k, v in self.engine.module.encoder.state_dict().items()})

    monkeypatch.setattr(PretrainTrainer, "optimizer_step", record)
    options = ["trainer.ema=0.75", f"precision={precision}", "strategy=deepspeed_stage_1"]
    last = pretrain(_config(tiny_clips, *options), tmp_path)
    average = weights[0]
    for step in weights[1:]:
        average = {name: 0.75 * average[name] + 0.25 * step[name] for name in average}
    found = load_encoder(last, part="encoder_ema").state_dict()
    assert len(weights) == 7
    for name, expected in average.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


def test_a_resume_needs_the_same_setting() -> None:
    averaged = {"config": {"trainer": {"ema": 0.9}}}
    check_average(averaged, 0.5)  # the decay may change
    check_average({}, None)  # a checkpoint of an earlier version
    with pytest.raises(CheckpointError, match=r"has an average of the encoder \(encoder_ema\), .*ema=null; use"):
        check_average(averaged, None)
    with pytest.raises(CheckpointError, match=r"has no average of the encoder .* trainer\.ema=0\.5"):
        check_average({"config": {"trainer": {}}}, 0.5)


@pytest.mark.parametrize("bad_batch", [1, 3])
def test_a_skipped_step_does_not_change_the_average(
    tiny_clips: Path, bad_batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The weights stay the same in such a step, so an update would move the average towards them."""
    averages: list[torch.Tensor] = []
    original, step, number = PretrainTrainer.losses, PretrainTrainer.optimizer_step, 0

    def with_nan(self: Any, batch: Any) -> Any:
        nonlocal number
        number += 1
        loss, values = original(self, batch)
        return loss * (float("nan") if number == bad_batch else 1.0), values

    def record(self: Any, *, is_last: bool) -> None:
        step(self, is_last=is_last)
        averages.append(self.engine.module.encoder_ema["encoder"].blocks[0].mlp.fc1.weight.clone())

    monkeypatch.setattr(PretrainTrainer, "losses", with_nan)
    monkeypatch.setattr(PretrainTrainer, "optimizer_step", record)
    pretrain(_config(tiny_clips, "trainer.ema=0.75", "trainer.on_nonfinite=skip"), tmp_path)
    same = [torch.equal(one, other) for one, other in itertools.pairwise(averages)]
    assert same == [bad_batch == 3 and i == 1 for i in range(5)]
