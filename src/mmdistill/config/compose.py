"""Compose a config outside of an entrypoint."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from mmdistill.config import ConfigError, DistillConfig, ModelConfig, PretrainConfig, parse, register_schemas
from mmdistill.config.overrides import quote_overrides

T = TypeVar("T", PretrainConfig, DistillConfig)


PACKAGE = Path(__file__).resolve().parents[1]
# Root of the source tree. None if a wheel is installed, which contains the configs inside the package.
SOURCE_ROOT = None if (PACKAGE / "configs").is_dir() else PACKAGE.parents[1]
CONFIGS = PACKAGE / "configs" if SOURCE_ROOT is None else SOURCE_ROOT / "configs"


def configs_dir() -> Path:
    """``configs/`` of the current folder if that is a source tree, otherwise the configs of this package.

    With an installed wheel, edits of a source tree's configs take effect where the commands are typed.
    """
    local = Path.cwd() / "configs"
    return local if (local / "config_pretrain.yaml").is_file() else CONFIGS


def dataset_arguments(path: Path) -> list[str] | None:
    """Arguments that select the dataset config `path`; None if its folder is not named ``dataset``."""
    folder = path.absolute().parent
    if folder.name != "dataset":
        return None
    in_configs = folder.parent.resolve() == configs_dir().resolve()
    return [*([] if in_configs else [f"--config-dir={folder.parent}"]), f"dataset={path.stem}"]


def load_dataset_settings(name: str, config_dir: Path | str | None = None) -> dict[str, Any]:
    """Read ``dataset/NAME.yaml`` in the configs of this package, else in `config_dir`: the order of Hydra.

    Raises `ConfigError` if there is none, or if it is invalid.
    """
    folders = [Path(config_dir)] if config_dir is not None else []
    paths = [folder / "dataset" / f"{name}.yaml" for folder in (configs_dir(), *folders)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        hint = "" if config_dir is not None else "; a config outside the repository needs --config-dir"
        raise ConfigError(f"dataset={name}: there is no {' and no '.join(map(str, paths))}{hint}")
    settings = yaml.safe_load(path.read_bytes())
    if not isinstance(settings, dict) or "defaults" in settings:
        raise ConfigError(f"{path}: expected a mapping of data_module keys without a defaults list")
    return settings


def model_presets() -> list[str]:
    """Names of the model presets in the configs of this package."""
    return sorted(path.stem for path in (configs_dir() / "model").glob("*.yaml"))


def load_model_preset(name: str) -> ModelConfig:
    """The sizes of ``model/NAME.yaml`` in the configs of this package. Raises `ConfigError` for an unknown key."""
    path = configs_dir() / "model" / f"{name}.yaml"
    try:
        return ModelConfig(**yaml.safe_load(path.read_bytes()))
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def select_files(overrides: Sequence[str], schema: type[Any]) -> list[str]:
    """`overrides` of the pretraining with the names that Hydra has for two groups of files.

    ``source=NAME`` selects ``dataset/NAME.yaml``. ``experiment=NAME`` selects ``experiment/pretrain_NAME.yaml`` if
    there is such a file: some experiments have one file for each phase. Other values do not change.
    """
    if schema is not PretrainConfig:
        return list(overrides)
    selected = []
    for override in overrides:
        group, _, names = override.partition("=")
        if group == "source" and names != "null" and re.fullmatch(r"[\w./,-]+", names):
            override = f"dataset@source={names}"
        elif group == "experiment" and (configs_dir() / group / f"pretrain_{names}.yaml").is_file():
            override = f"experiment=pretrain_{names}"
        selected.append(override)
    return selected


@contextmanager
def explain_null_source(overrides: Sequence[str]) -> Iterator[None]:
    """While open, OmegaConf's errors about ``source.KEY=VALUE`` without a source and ``source={...}`` are explained."""
    try:
        yield
    except (AssertionError, AttributeError) as error:
        keys = [override.partition("=")[0] for override in overrides if re.match(r"source(\.|=\{)", override)]
        if not keys:
            raise
        raise ConfigError(f"{keys[0]}: source is null; select its dataset by name, such as source=tennis") from error


def compose_config(
    config_name: str,
    overrides: Sequence[str],
    *,
    config_dir: Path | str | None = None,
    config_path: Path | str | None = None,
) -> DictConfig:
    """Compose a config as the entrypoints do, without its validation.

    Args:
        config_name: file name in configs/ without its suffix.
        overrides: overrides as typed on a command line.
        config_dir: additional folder of configs, as Hydra's ``--config-dir``.
        config_path: folder of the main config, as Hydra's ``--config-path``; None: `configs_dir`.

    Raises:
        ConfigError: `config_dir` is no folder, or a key of a null `source` is set.
        HydraException: the config cannot be composed.
    """
    register_schemas()
    more = [*overrides]
    if config_dir is not None:
        searched = Path(config_dir).absolute()
        if not searched.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: there is no such folder")
        more.append(f"hydra.searchpath=[file://{searched}]")
    folder = Path(config_path or configs_dir()).absolute()
    with initialize_config_dir(str(folder), version_base="1.3"), explain_null_source(more):
        return compose(config_name, quote_overrides(more))


def load_config(
    schema: type[T], config_name: str, overrides: Sequence[str], *, config_dir: Path | str | None = None
) -> T:
    """`compose_config`, parsed and validated. `schema` is the dataclass of the config.

    Raises:
        ConfigError: `config_dir` is no folder, or a value is invalid.
        HydraException: the config cannot be composed.
    """
    return parse(compose_config(config_name, select_files(overrides, schema), config_dir=config_dir), schema)
