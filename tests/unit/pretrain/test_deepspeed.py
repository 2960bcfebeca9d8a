"""The DeepSpeed config of a pretraining."""

from typing import Any

import pytest

from mmdistill.config import PretrainConfig
from mmdistill.pretrain.deepspeed import deepspeed_config
from tests.configs import pretrain_config


def _config(*overrides: str) -> PretrainConfig:
    return pretrain_config("modality=rgb", "accelerator=cpu", *overrides)


@pytest.mark.parametrize(
    ("strategy", "zero"),
    [
        ("auto", {"stage": 0}),
        ("deepspeed", {"stage": 2}),
        ("deepspeed_stage_3", {"stage": 3}),
        ("deepspeed_stage_1_offload", {"stage": 1, "offload_optimizer": {"device": "cpu"}}),
    ],
)
def test_strategy_decides_stage_and_offload(strategy: str, zero: dict[str, Any]) -> None:
    assert deepspeed_config(_config(f"strategy={strategy}"), "32")["zero_optimization"] == zero


def test_trainer_keys_reach_deepspeed() -> None:
    config = _config("batch_size=3", "trainer.accumulate_grad_batches=2", "trainer.clip_grad=0.5")
    values = deepspeed_config(config, "32")
    assert values["train_micro_batch_size_per_gpu"] == 3
    assert values["gradient_accumulation_steps"] == 2
    assert values["gradient_clipping"] == 0.5
    assert deepspeed_config(_config("trainer.clip_grad=null"), "32")["gradient_clipping"] == 0.0  # no clipping


def test_precision_enables_one_format() -> None:
    formats = {p: set(deepspeed_config(_config(), p)) & {"bf16", "fp16"} for p in ("32", "bf16", "16")}
    assert formats == {"32": set(), "bf16": {"bf16"}, "16": {"fp16"}}
