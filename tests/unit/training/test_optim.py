"""Learning rates, parameter groups, layer decay and schedule."""

from typing import Any

import pytest
import torch
from torch import nn

from mmdistill.config.schema import PretrainTrainerConfig
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE
from mmdistill.training.optim import (
    Optimization,
    StepSchedule,
    layer_index,
    make_optimizer,
    schedule_warnings,
)

ENCODER = EncoderConfig(3, 4, 16, 16, 8, 2, 16, 2, 2, 8, 32)


def test_linear_scaling_rule() -> None:
    trainer = PretrainTrainerConfig(epochs=4, lr=1.0, min_lr=0.1, warmup_lr=0.01, warmup_epochs=0.5)
    assert Optimization.from_config(trainer, global_batch=512, steps_per_epoch=10) == Optimization(
        lr=2.0, min_lr=0.2, warmup_lr=0.02, warmup_steps=5, total_steps=40
    )


def test_schedule_of_one_step_has_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = StepSchedule(optimizer, Optimization(1.0, min_lr=0.1, total_steps=1))
    assert not caplog.text
    rates = []
    for step in range(2):
        schedule.step_update(step)
        rates.append(schedule.lr)
    assert rates == [1.0, 0.1]


def test_layer_index() -> None:
    names = {
        "encoder.patch_embed.proj.weight": 0,
        "student_rgb.encoder.pos_embed": 0,
        "encoder.blocks.0.attn.qkv.weight": 1,
        "student_rgb.encoder.blocks.11.mlp.fc1.bias": 12,
        "encoder.norm.weight": 13,
        "decoder.blocks.0.attn.qkv.weight": 13,
        "cmt.mlp_to_rgb.0.weight": 13,
        "mask_token": 13,
    }
    assert {name: layer_index(name, 12) for name in names} == names


def test_layer_decay_scales_learning_rates_by_layer() -> None:
    model = VideoMAE(ENCODER, DecoderConfig(8, 1, 1, 8, 16))
    optimization = Optimization(1.0, weight_decay=0.1, layer_decay=0.5, warmup_steps=4, total_steps=10)
    optimizer = make_optimizer(model, optimization)
    schedule = StepSchedule(optimizer, optimization)

    def rates() -> dict[str, tuple[float, float]]:
        by_id = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        return {name: by_id[id(p)] for name, p in model.named_parameters()}

    schedule.step_update(4)
    full = rates()
    assert full["encoder.patch_embed.proj.weight"] == pytest.approx((full["mask_token"][0] / 8, 0.1))
    assert full["encoder.blocks.0.norm1.weight"] == pytest.approx((full["mask_token"][0] / 4, 0.0))
    assert full["encoder.blocks.1.mlp.fc1.weight"] == pytest.approx((full["mask_token"][0] / 2, 0.1))
    assert full["encoder.norm.weight"] == full["mask_token"] == full["decoder.blocks.0.norm1.weight"]
    assert full["decoder.head.weight"][1] == 0.1
    assert schedule.lr == full["mask_token"][0] > 0.5  # the logged learning rate
    schedule.step_update(2)
    assert rates()["encoder.patch_embed.proj.weight"][0] == pytest.approx(0.5 / 8)


def test_layer_decay_of_one_changes_nothing() -> None:
    weights = []
    for decay in (None, 1.0):
        torch.manual_seed(0)
        encoder = nn.ModuleDict({"encoder": Encoder(ENCODER)})
        optimizer = make_optimizer(encoder, Optimization(0.01, weight_decay=0.1, layer_decay=decay))
        for _ in range(3):
            optimizer.zero_grad()
            encoder["encoder"](torch.ones(1, 3, 4, 16, 16)).square().sum().backward()
            optimizer.step()
        weights.append({n: p.detach().clone() for n, p in encoder.named_parameters()})
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_learned_position_embeddings_are_not_decayed() -> None:
    """Independent of the encoder's prefix."""
    config = EncoderConfig(3, 4, 16, 16, 8, 2, 16, 2, 2, 8, 32, pos_embed="learned")
    module = nn.ModuleDict({"student_rgb": nn.ModuleDict({"encoder": Encoder(config)})})
    optimizer = make_optimizer(module, Optimization(1.0, weight_decay=0.1))
    by_id = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decay = {name: by_id[id(p)] for name, p in module.named_parameters()}
    assert decay["student_rgb.encoder.pos_embed"] == 0
    assert decay["student_rgb.encoder.patch_embed.proj.weight"] == 0.1


def test_hyperparameters_are_restored_after_loading_a_state() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    own, other = (Optimization(1.0, weight_decay=w, warmup_steps=4, total_steps=12) for w in (0.1, 0.2))
    optimizer = make_optimizer(nn.ParameterList([parameter]), own)
    schedule = StepSchedule(optimizer, own)
    optimizer.load_state_dict(make_optimizer(nn.ParameterList([parameter]), other).state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    schedule.restore(2)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert schedule.lr == pytest.approx(0.5)


def test_schedule_warms_up_and_ends_at_min_lr() -> None:
    optimization = Optimization(1.0, 0.25, 0.5, warmup_steps=4, total_steps=12)
    schedule = StepSchedule(make_optimizer(nn.Linear(2, 2), optimization), optimization)
    rates = []
    for step in (0, 2, 4, 12):
        schedule.step_update(step)
        rates.append(schedule.lr)
    assert rates[:2] == pytest.approx([0.5, 0.75])
    assert rates[2] > rates[3]
    assert rates[3] == pytest.approx(0.25)


def test_unusual_schedules_are_reported() -> None:
    def warnings(source: dict[str, Any] | None = None, **changes: float) -> str:
        return "\n".join(schedule_warnings(PretrainTrainerConfig(**{"epochs": 9, "lr": 1.0, **changes}), source))  # type: ignore[arg-type]

    source = {"config": {"trainer": {"epochs": 9}}}
    assert warnings() == warnings(source) == warnings({}) == warnings({"config": None}) == ""
    assert warnings(epochs=1, warmup_epochs=0) == ""
    assert "trainer.warmup_epochs=9 is not below trainer.epochs=9" in warnings(warmup_epochs=9)
    assert "trainer.epochs=12, but the checkpoint was trained with trainer.epochs=9: " in warnings(source, epochs=12)
