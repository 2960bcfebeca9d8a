"""Convert a composed config to the schema's dataclasses, and these to the containers that a checkpoint stores."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mmdistill.config.error_messages import key_of_other_phase, near_matches, other_phase_message
from mmdistill.config.renames import describe_old_key, translate_stored
from mmdistill.config.rules import ConfigError
from mmdistill.config.schema import DistillConfig, PretrainConfig, Sealable
from mmdistill.config.validation import validate

T = TypeVar("T", PretrainConfig, DistillConfig)


def parse(cfg: DictConfig, schema: type[T]) -> T:
    """Convert a composed config to a validated, read-only instance of `schema`. Raises `ConfigError` naming the key."""
    if OmegaConf.get_type(cfg) not in (dict, schema):
        raise ConfigError(other_phase_message(schema))
    try:  # the merge rejects keys that Hydra has added for ``+key=value``
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.to_container(cfg))
        config = cast(T, OmegaConf.to_object(merged))
    except ConfigKeyError as error:
        key = error.full_key or ""
        described = describe_old_key(key) or key_of_other_phase(key, schema)
        raise ConfigError(described or f"unknown key {key}{near_matches(key, schema)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
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
    """Parse the config that a checkpoint stores, with ``key=value`` overrides.

    Keys and values of earlier versions are translated. No object is instantiated.

    Args:
        plain: the result of `to_plain`.
        schema: class of the config.
        overrides: ``key=value`` with dotted keys of this version.

    Raises:
        ConfigError: a key is unknown to this version, or a value is wrong.
    """
    merged = OmegaConf.merge(translate_stored(plain), OmegaConf.from_dotlist(list(overrides)))
    return parse(cast(DictConfig, merged), schema)


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
