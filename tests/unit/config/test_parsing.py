"""Composed configs become read-only dataclasses, and plain containers for a checkpoint."""

import dataclasses

import pytest

from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, stored_config, to_plain
from mmdistill.config.compose import load_config


def test_parsed_config_is_read_only() -> None:
    config = load_config(PretrainConfig, "config_pretrain", ["modality=rgb"])
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"TrainerConfig\.lr"):
        config.trainer.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data_module.modalities["rgb"].input_stride = 3


@pytest.mark.parametrize(
    ("schema", "name", "overrides"),
    [
        (PretrainConfig, "config_pretrain", ["modality=flow"]),
        (DistillConfig, "config_mmdistill", ["trainer.ckpt_path={rgb:a,flow:b,skeleton:c}"]),
    ],
)
def test_stored_config_equals_the_config(schema: type, name: str, overrides: list[str]) -> None:
    config = load_config(schema, name, overrides)
    assert stored_config(to_plain(config), schema) == config


def test_stored_config_takes_overrides() -> None:
    plain = to_plain(load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]))
    assert stored_config(plain, PretrainConfig, ["data_module.mask_ratio=0.9"]).data_module.mask_ratio == 0.9
    with pytest.raises(
        ConfigError, match=r"^unknown key data_module\.mask_rtio\. Near matches: data_module\.mask_ratio"
    ):
        stored_config(plain, PretrainConfig, ["data_module.mask_rtio=0.9"])
    with pytest.raises(ConfigError, match=r"^data_module\.missing was renamed to data_module\.on_missing$"):
        stored_config(plain, PretrainConfig, ["data_module.missing=skip"])


def test_plain_config_has_builtin_containers_only() -> None:
    plain = to_plain(load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]))
    assert type(plain["data_module"]["modalities"]["rgb"]) is dict
    assert plain["trainer"]["betas"] == [0.9, 0.95]
