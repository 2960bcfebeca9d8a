"""Configs for tests: composed once by Hydra, then changed by dotted overrides, which takes milliseconds."""

import json
from functools import cache
from typing import Any

from mmdistill.config import DistillConfig, PretrainConfig, stored_config, to_plain
from mmdistill.config.compose import load_config

TEACHERS = "trainer.ckpt_path=[a,b,c]"


@cache
def _pretrain_defaults() -> dict[str, Any]:
    return to_plain(load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]))


@cache
def _distill_defaults() -> dict[str, Any]:
    return to_plain(load_config(DistillConfig, "config_mmdistill", [TEACHERS]))


def pretrain_config(*overrides: str) -> PretrainConfig:
    """The pretraining of rgb on the demo data, with ``key=value`` overrides."""
    return stored_config(_pretrain_defaults(), PretrainConfig, overrides)


def distill_config(*overrides: str) -> DistillConfig:
    """The distillation on the demo data, with ``key=value`` overrides."""
    return stored_config(_distill_defaults(), DistillConfig, overrides)


def source_override(*overrides: str) -> str:
    """The override that makes the data of a pretraining with these overrides the source of another."""
    return f"source={json.dumps(to_plain(pretrain_config(*overrides).data_module))}"
