"""Convert a composed config to the schema's dataclasses, and these to the containers that a checkpoint stores."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdistill.config.error_messages import near_matches
from mmdistill.config.renames import describe_old_key, translate_stored
from mmdistill.config.schema import ConfigError, DistillConfig, PretrainConfig, Sealable
from mmdistill.config.validation import validate

T = TypeVar("T", PretrainConfig, DistillConfig)


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """Convert a composed config to a validated, read-only instance of `schema`. Raises `ConfigError` naming the key."""
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise _config_error(error) from error
    if not isinstance(config, schema):
        name = "pretrain_schema" if issubclass(schema, PretrainConfig) else "distill_schema"
        raise ConfigError(f"the config's defaults list must start with {name}, see configs/")
    _reject_unknown_keys(config, schema)
    validate(config)
    _seal(config)
    return config


def _reject_unknown_keys(config: object, schema: type[Any], prefix: str = "") -> None:
    """Raise for keys that are not in the schema: Hydra adds any key that is written as ``+key=value``."""
    if isinstance(config, dict):
        for name, value in config.items():
            _reject_unknown_keys(value, schema, f"{prefix}{name}.")
    elif isinstance(config, Sealable):
        known = {f.name for f in fields(cast(Any, config))}
        for name, value in vars(config).items():
            key = prefix + name
            if name not in known:
                raise ConfigError(describe_old_key(key) or f"unknown key {key}{near_matches(name, schema)}")
            _reject_unknown_keys(value, schema, f"{key}.")


def _seal(config: object) -> None:
    if isinstance(config, Sealable):
        for f in fields(cast(Any, config)):
            _seal(getattr(config, f.name))
        config.__dict__["_sealed"] = True
    elif isinstance(config, dict):
        for value in config.values():
            _seal(value)


def stored_config(plain: dict[str, Any], schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Parse the config that a checkpoint stores, with ``key=value`` overrides.

    Keys and values of earlier versions are translated. No object is instantiated.

    Args:
        plain: the result of `to_plain`.
        schema: class of the config.
        overrides: ``key=value`` with dotted keys of this version.

    Raises:
        ConfigError: a key is unknown to this version, or a value is wrong.
    """
    try:
        dotlist = OmegaConf.from_dotlist(list(overrides))
        merged = OmegaConf.merge(OmegaConf.structured(schema), translate_stored(plain), dotlist)
    except OmegaConfBaseException as error:
        raise _config_error(error) from error
    return parse(cast(DictConfig, merged), schema)


def _config_error(error: OmegaConfBaseException) -> ConfigError:
    """Name the key and the first line of an OmegaConf error, or what replaces the key if it is an old one."""
    key = getattr(error, "full_key", None) or "config"
    return ConfigError(describe_old_key(key) or f"{key}: {str(error).splitlines()[0]}")


def to_plain(config: object) -> dict[str, Any]:
    """Convert a config to builtin containers, which a checkpoint can store."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(cast(Any, config))}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
