"""Options and ``--help`` of the verbs with a Hydra config: each key with its value and meaning. Imports no torch."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmdistill.cli.config_reference import field_comments
from mmdistill.config import ConfigError, DistillConfig, PretrainConfig, schema
from mmdistill.config.compose import compose_config, configs_dir
from mmdistill.config.error_messages import known_keys
from mmdistill.errors import suggest_nearest

TRAINING_KEYS = ("trainer.", "data_module.mask_ratio", "data_module.hflip_prob", "data_module.random_crop_min_scale")
Schema = type[PretrainConfig] | type[DistillConfig]


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's options and the overrides of a command line.

    Raises:
        ConfigError: an option is unknown or has no value. Hydra would print its usage.
    """
    parser = get_args_parser()
    parser.allow_abbrev = parser.exit_on_error = False
    try:
        options, others = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from None
    if unknown := [argument.partition("=")[0] for argument in others if argument.startswith("-")]:
        names = [name for action in parser._actions for name in action.option_strings]
        raise ConfigError(f"{unknown[0]}: unknown option{suggest_nearest(unknown[0], names)}")
    return options


def render_help(usage: str, schema_class: Schema, config_name: str, options: argparse.Namespace) -> str:
    """The text of ``--help``: `usage`, the config groups that the verb accepts, and each key of the composed config."""
    name, folders = options.config_name or config_name, {"config_dir": options.config_dir}
    folders["config_path"] = options.config_path
    values: Any = OmegaConf.to_container(compose_config(name, options.overrides, **folders))
    groups = _accepted_groups(schema_class, name, folders, options.overrides)
    lines = [usage, "", "Groups (GROUP=NAME selects a file of configs):", ""]
    lines += [f"  {group}={' | '.join(names)}" for group, names in groups.items()]
    lines += ["", f"Keys (KEY=VALUE changes a value; these are the values of {name}):", ""]
    width = min(shutil.get_terminal_size().columns, 120)
    comments = field_comments(Path(schema.__file__).read_text(encoding="utf-8"))
    for key, meaning in _describe_keys(schema_class, values, comments):
        lines += [f"  {key}", *textwrap.wrap(meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


def _accepted_groups(
    schema_class: Schema, config_name: str, folders: Mapping[str, str | None], overrides: Sequence[str], only: str = "*"
) -> dict[str, list[str]]:
    """Group -> names of its files with which the config of the verb composes and whose sweeps have keys of the verb.

    An evaluation (`overrides` contain ``train=False``) does not accept a sweep over a key of the training: all its jobs
    would have the same result. `only`: name of a group; ``*``: all groups.
    """
    keys, found = known_keys(schema_class), dict[str, list[str]]()
    groups = sorted(folder.name for folder in configs_dir().glob(only) if folder.is_dir())
    for group, path in [(g, path) for g in groups for path in _group_files(f"{g}/*", folders)]:
        try:
            compose_config(config_name, [f"{group}={path.stem}"], **folders)
            swept = _swept_keys(path)
        except (HydraException, OmegaConfBaseException, ConfigError):
            continue
        is_other = _is_of_other_phase(group, path.stem, schema_class) or _sweeps_in_vain(path, overrides)
        if swept <= set(keys) and not is_other and path.stem not in found.setdefault(group, []):
            found[group].append(path.stem)
    return {group: names for group, names in found.items() if names}


def _group_files(pattern: str, folders: Mapping[str, str | None]) -> list[Path]:
    roots = [Path(folder) for folder in (folders["config_path"] or configs_dir(), folders["config_dir"]) if folder]
    return [path for root in roots for path in sorted(root.glob(f"{pattern}.yaml"))]


def _swept_keys(path: Path) -> set[str]:
    """Keys that a file of a group sweeps."""
    content = yaml.safe_load(path.read_bytes()) or {}
    return set(content.get("hydra", {}).get("sweeper", {}).get("params", {}))


def _is_of_other_phase(group: str, name: str, schema_class: Schema) -> bool:
    """Whether a file is a trainer or an experiment of the other phase, whose name has the name of the phase.

    Both phases accept the keys, but the values fit one phase only.
    """
    return group in ("trainer", "experiment") and ("distill" if schema_class is PretrainConfig else "pretrain") in name


def _sweeps_in_vain(path: Path, overrides: Sequence[str]) -> bool:
    """Whether `overrides` are those of an evaluation, and the file sweeps a key of the training."""
    is_sweep = "hydra.mode=RUN" not in overrides
    return _is_evaluation(overrides) and is_sweep and any(key.startswith(TRAINING_KEYS) for key in _swept_keys(path))


def _is_evaluation(overrides: Sequence[str]) -> bool:
    return any(re.fullmatch(r"train=false", override, re.IGNORECASE) for override in overrides)


def has_misfit(schema_class: Schema, options: argparse.Namespace) -> bool:
    """Whether an override selects a file that composes, but whose values fit another verb. Composes no config."""
    return any(
        _is_of_other_phase(group, choice, schema_class)
        or any(_sweeps_in_vain(path, options.overrides) for path in paths)
        for group, choice, paths in _selected_files(options)
    )


def _selected_files(options: argparse.Namespace) -> Iterator[tuple[str, str, list[Path]]]:
    """(group, name, files) of each override that selects an existing file of a group."""
    folders = {"config_path": options.config_path, "config_dir": options.config_dir}
    for override in options.overrides:
        group, _, choice = override.partition("=")
        if re.fullmatch(r"\w+=[\w-]+", override) and (paths := _group_files(f"{group}/{choice}", folders)):
            yield group, choice, paths


def describe_rejected_group(schema_class: Schema, config_name: str, options: argparse.Namespace) -> str | None:
    """The message about the first override that selects a file of a group for the other phase; None if none does."""
    folders = {"config_path": options.config_path, "config_dir": options.config_dir}
    name = options.config_name or config_name
    for group, choice, _ in _selected_files(options):
        names = _accepted_groups(schema_class, name, folders, options.overrides, group).get(group, [])
        if names and choice not in names:
            training = "pretrain" if schema_class is PretrainConfig else "distill"
            verb = "evaluate" if _is_evaluation(options.overrides) else training
            return f"{group}={choice}: not a config for `mmdistill {verb}`; choose one of {', '.join(names)}"
    return None


def _describe_keys(
    group: type[Any], values: Mapping[str, Any], comments: Mapping[tuple[str, str], str], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """``KEY=VALUE`` and the meaning of each key. The entries of `modalities` share one description."""
    for field in fields(group):
        key, value = prefix + field.name, values[field.name]
        if field.name == "modalities":
            for part in fields(schema.ModalityConfig):
                if part.name == "extra_keypoints":  # its keys are in docs/config.md
                    continue
                own = ", ".join(f"{name}: {_format_value(entry[part.name])}" for name, entry in value.items())
                yield f"{key}.NAME.{part.name} ({own})", comments["ModalityConfig", part.name]
        elif (nested := schema.nested_class(field.type)) is not None and value is not None:
            yield from _describe_keys(nested, value, comments, f"{key}.")
        else:
            owner = next(c.__name__ for c in group.__mro__ if field.name in vars(c).get("__annotations__", {}))
            yield f"{key}={_format_value(value)}", comments[owner, field.name]


def _format_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_format_value, value))}]"
    if value == MISSING:
        return "(required)"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
