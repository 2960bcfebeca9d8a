"""Compose a config outside of an entrypoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from hydra import compose, initialize_config_dir

from mmdistill.config import (
    DistillConfig,
    PretrainConfig,
    parse,
    register_schemas,
)
from mmdistill.config.overrides import quote_overrides

T = TypeVar("T", PretrainConfig, DistillConfig)


CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def load_config(schema: type[T], config_name: str, overrides: Sequence[str]) -> T:
    """A config as the entrypoints compose it, for scripts; `overrides` are as typed on a command line."""
    register_schemas()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return parse(compose(config_name, quote_overrides(overrides)), schema)
