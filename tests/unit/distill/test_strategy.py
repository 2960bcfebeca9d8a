"""The Trainer's arguments for each strategy and precision."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import CheckpointError
from mmdistill.config import ConfigError
from mmdistill.distill.strategy import (
    SingleFileDDPStrategy,
    SingleFileDeepSpeedStrategy,
    VerifiedCheckpointIO,
    strategy_kwargs,
)
from tests.configs import distill_config
from tests.tiny_data import overrides


def _kwargs(strategy: str, precision: str = "32") -> dict[str, Any]:
    given = [*overrides(Path("nowhere")), "trainer.ckpt_path=[a,b,c]", f"strategy={strategy}"]
    return strategy_kwargs(distill_config(*given), precision)


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(("visible", "expected"), [(1, (1, 4)), (2, (2, 2)), (4, (4, 1)), (8, (4, 1))])
def test_devices_are_those_that_the_rank_sees(
    visible: int, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    kwargs = _kwargs("auto")
    assert (kwargs["devices"], kwargs["num_nodes"]) == expected


def test_one_process_uses_lightnings_default() -> None:
    kwargs = _kwargs("auto", "bf16")
    assert (kwargs["strategy"], kwargs["precision"]) == ("auto", "bf16-mixed")
    assert (kwargs["devices"], kwargs["num_nodes"]) == (1, 1)
    assert isinstance(kwargs["plugins"][0], VerifiedCheckpointIO)


def test_several_processes_use_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    kwargs = _kwargs("auto")
    assert isinstance(kwargs["strategy"], SingleFileDDPStrategy)
    assert (kwargs["devices"], kwargs["num_nodes"]) == (4, 2)


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("deepspeed", 2, False),
        ("deepspeed_stage_0", 0, False),
        ("deepspeed_stage_1", 1, False),
        ("deepspeed_stage_1_offload", 1, True),
        ("deepspeed_stage_2", 2, False),
        ("deepspeed_stage_2_offload", 2, True),
    ],
)
def test_strategy_name_decides_stage_and_offload(name: str, stage: int, offload: bool) -> None:
    strategy = _kwargs(name)["strategy"]
    zero = strategy.config["zero_optimization"]
    assert (zero["stage"], "offload_optimizer" in zero) == (stage, offload)
    assert strategy.handles_gradient_accumulation is False


def test_bf16_under_deepspeed_keeps_weights_in_float32() -> None:
    kwargs = _kwargs("deepspeed", "bf16")
    assert kwargs["precision"] == "32-true"
    assert kwargs["strategy"].config["torch_autocast"]["dtype"] == "bfloat16"


def test_unsupported_settings_raise() -> None:
    with pytest.raises(ConfigError, match="strategy=deepspeed does not support precision=16"):
        _kwargs("deepspeed", "16")
    with pytest.raises(ValueError, match=r"ZeRO stage 3: .* use stage 0, 1 or 2"):
        SingleFileDeepSpeedStrategy(3, batch_size=1)
    with pytest.raises(ValueError, match="offload needs ZeRO stage 1 or 2"):
        SingleFileDeepSpeedStrategy(0, batch_size=1, offload=True)


def test_optimizer_state_of_other_parameters_is_rejected() -> None:
    strategy = SingleFileDeepSpeedStrategy(1, batch_size=1)
    strategy._param_groups = [[torch.nn.Parameter(torch.zeros(2))], [torch.nn.Parameter(torch.zeros(3))]]
    moments = {i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(size)} for i, size in enumerate((2, 3))}
    groups = [{"params": [0]}, {"params": [1]}]
    strategy._check_optimizer_state({"param_groups": groups, "state": moments})
    with pytest.raises(CheckpointError, match="groups of 2 parameters, this run's has 1, 1"):
        strategy._check_optimizer_state({"param_groups": [{"params": [0, 1]}], "state": moments})
    with pytest.raises(CheckpointError, match=r"moment of shape \{\(3,\)\}, not \(2,\)"):
        strategy._check_optimizer_state({"param_groups": groups, "state": {0: moments[1], 1: moments[1]}})
    strategy._param_groups = [[*strategy._param_groups[0], *strategy._param_groups[1]]]
    steps = {0: moments[0], 1: {**moments[1], "step": torch.tensor(2.0)}}
    with pytest.raises(CheckpointError, match="different steps, which ZeRO does not support"):
        strategy._check_optimizer_state({"param_groups": [{"params": [0, 1]}], "state": steps})
