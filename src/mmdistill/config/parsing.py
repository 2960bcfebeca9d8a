"""From a composed config to the schema's dataclasses, and from these to what a checkpoint keeps."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdistill.config.schema import ConfigError, DistillConfig, PretrainConfig, Sealable
from mmdistill.config.validation import validate

T = TypeVar("T", PretrainConfig, DistillConfig)


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """The validated, frozen config. Raises `ConfigError` naming the key."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key or 'config'}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, schema):
        raise ConfigError(f"the config's defaults list must start with the schema of {schema.__name__}")
    validate(config)
    _seal(config)
    return config


def _seal(config: object) -> None:
    if isinstance(config, Sealable):
        for f in fields(cast(Any, config)):
            _seal(getattr(config, f.name))
        config.__dict__["_sealed"] = True
    elif isinstance(config, dict):
        for value in config.values():
            _seal(value)


def stored_config(plain: dict[str, Any], schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The config that a checkpoint carries (`to_plain`), with ``key=value`` overrides; nothing is instantiated.

    Raises:
        ConfigError: a key is unknown to this version, or a value is wrong.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain, OmegaConf.from_dotlist(list(overrides)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key or 'config'}: {str(error).splitlines()[0]}") from error
    return parse(cast(DictConfig, merged), schema)


def to_plain(config: object) -> dict[str, Any]:
    """A config as builtin containers, to store in a checkpoint."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(cast(Any, config))}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
