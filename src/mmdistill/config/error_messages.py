"""One-line messages for errors of Hydra, OmegaConf and this package."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from mmdistill.config.overrides import without_option_values
from mmdistill.config.renames import describe_old_key, renamed_key
from mmdistill.config.schema import CommonConfig, DistillConfig, ModalityConfig, PretrainConfig
from mmdistill.errors import MMDistillError, suggest_nearest

_CONFIG_GROUPS = ("dataset", "experiment")  # keys of a command that select a file of configs/; not in the schema


def known_keys(schema: type[Any] = CommonConfig, prefix: str = "") -> list[str]:
    """Every dotted key of a schema. Keys of `modalities`, a dictionary, and `source`, null or a dataset, are not."""
    keys = []
    for f in fields(schema):
        keys.append(prefix + f.name)
        if isinstance(f.type, type) and is_dataclass(f.type):
            keys += known_keys(f.type, f"{prefix}{f.name}.")
    return keys


# DataLoader replaces the message of an exception in a worker by that worker's traceback, which ends with the message.
_FROM_WORKER = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback.*\n[\w.]*\1: (.*?)\n?", re.DOTALL
)


def explain(error: Exception, schema: type[Any]) -> str:
    """Describe an error for the user: the message of an own error, one sentence for one of Hydra or OmegaConf.

    An old key is reported with its replacement, an unknown key with the nearest known keys.

    Args:
        error: any exception.
        schema: class of the config, whose keys are suggested.
    """
    if isinstance(error, MMDistillError) and not isinstance(error.__cause__, OmegaConfBaseException):
        worker = _FROM_WORKER.fullmatch(str(error))
        return worker[2] if worker else str(error)  # in full: later lines list the details
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"  # Python's text starts with "[Errno 2]"
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = "\n".join(str(e) for e in chain)
    if missing := re.search(r"missing mandatory value: (\S+)", text, re.IGNORECASE):
        if re.sub(r"^source\.", "data_module.", missing[1]) not in known_keys(schema):
            return other_phase_message(schema)
        return f"{missing[1]} is not given; give it on the command line, for example modality=rgb"
    if old := _describe_old_keys(chain, text, schema):
        return old
    if name := re.search(r"Cannot find primary config '([^']+)'", text):
        folders = [Path(folder.strip()) for folder in re.findall(r"path=file://(.+)", text)]
        other = "config_mmdistill" if schema is PretrainConfig else "config_pretrain"
        names = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        names = [config for config in names if not config.startswith(other)]
        return f"--config-name={name[1]}: not one of {', '.join(names)}{suggest_nearest(name[1], names)}"
    found = re.search(r"not in '(Pretrain|Distill)(?:Trainer)?Config'", text)
    if found and not schema.__name__.startswith(found[1]):
        return other_phase_message(schema)
    if "model" not in known_keys(schema) and re.search(r"(?:Could not override|Key) 'model['.]", text):
        return "model: distillation and evaluation use the model of the checkpoint; remove model from the command"
    first_lines = [
        next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__) for e in chain
    ]
    message = first_lines[0]
    for detail in first_lines[1:]:
        if detail not in message and "$VALUE" not in detail:  # a template of OmegaConf that is not filled in
            message += f" ({detail})"
    if (given := re.search(r"Could not override '([^']+)'", text)) and (
        other_key := key_of_other_phase(given[1], schema)
    ):
        return other_key
    if value := _describe_wrong_type(text):
        return value
    if word := re.search(r"Error parsing override '([^'=]*)'\nmissing EQUAL", text):
        return f"{word[1]}: not of the form KEY=VALUE, for example seed=1"
    if "Ambiguous value for argument" in text:
        message += ": a comma outside quotes makes a sweep (-m); for a path with a comma write \"key='/a, b/c'\""
    if options := getattr(error, "options", None):  # set by Hydra if a group has no such file
        missing_file = str(getattr(error, "missing_cfg_file", ""))
        missing_name = missing_file.rpartition("/")[2]
        message = (
            f"{message.rstrip('.')}. Available: {', '.join(options)}{suggest_nearest(missing_name, options) or '.'}"
        )
        message += f" A config outside the repository needs --config-dir=DIR and the file DIR/{missing_file}.yaml"
    if match := re.search(r"Key '([^']+)'", text):
        is_last_part = given is not None and given[1].endswith(f".{match[1]}")
        message = message.rstrip(".") + near_matches(given[1] if given and is_last_part else match[1], schema)
    return message


def describe_misplaced_key(argv: Sequence[str], schema: type[Any]) -> str | None:
    """The message about ``modality rgb``, ``--modality rgb`` or ``--modality=rgb``; None if there is no such key."""
    keys = {*_CONFIG_GROUPS, *known_keys(schema)}
    for i, argument in without_option_values(argv):
        key, equal, value = argument.removeprefix("--").partition("=")
        following = "".join(argv[i + 1 : i + 2])
        if key in keys and (argument.startswith("--") or not equal):
            given = argument if equal else f"{argument} {following}".rstrip()
            return f"{given}: write {key}={(value if equal else following) or 'VALUE'}"
    return None


_TYPES = {"Integer": "a whole number", "Float": "a number", "bool": "True or False"}  # by OmegaConf's name


def _describe_wrong_type(text: str) -> str | None:
    """The message about a value that OmegaConf cannot convert to the type of its key; None for other errors."""
    override = re.search(r"Error merging override (\S+=.*)", text)
    expected = re.search(r"could not be converted to (Integer|Float)|is not a valid (bool)", text)
    if override is None or expected is None:
        return None
    return f"{override[1]} must be {_TYPES[expected[1] or expected[2]]}"


def key_of_other_phase(name: str, schema: type[Any]) -> str | None:
    """The message about a key that only the config of the other phase has; None for other keys."""
    other, verb = (DistillConfig, "distill") if schema is PretrainConfig else (PretrainConfig, "pretrain")
    if name in known_keys(schema) or name not in known_keys(other):
        return None
    return f"{name}: a key of `mmdistill {verb}`, not of this verb; remove it from the command"


def other_phase_message(schema: type[Any]) -> str:
    """The error about a config of the pretraining in a distillation, or the reverse."""
    phase, name = ("pretrain", "config_pretrain") if schema is PretrainConfig else ("distill", "config_mmdistill")
    return (
        f"--config-name selects a config of another verb; use {name} or {name}_tennis, or a config of your own whose "
        f"defaults list starts with {phase}_schema"
    )


def near_matches(name: str, schema: type[Any]) -> str:
    """``. Near matches: ...`` with at most three keys, or nothing.

    The last part of these keys is similar to that of `name`. If some of them have the same parent as `name`, the others
    are omitted. `source` has the keys of `data_module`. For a key of a modality only its keys are searched.
    """
    if name.startswith("source."):
        return near_matches(f"data_module.{name.removeprefix('source.')}", schema).replace("data_module.", "source.")
    keys = [*_CONFIG_GROUPS, *known_keys(schema)]
    if modality := re.match(r"data_module\.modalities\.\w+\.", name):
        keys = known_keys(ModalityConfig, modality[0])
    parent, _, last = name.rpartition(".")
    close = difflib.get_close_matches(last, {key.rpartition(".")[2] for key in keys}, n=3)
    near = [key for key in keys if key.rpartition(".")[2] in close]
    near = [key for key in near if parent and key.rpartition(".")[0] == parent] or near
    return f". Near matches: {', '.join(near[:3])}" if near else ""


def _describe_old_keys(chain: list[BaseException], text: str, schema: type[Any]) -> str | None:
    """What replaces the old key or config group that an error is about; None if it is about none."""
    keys = [key for key in (getattr(e, "full_key", None) for e in chain) if key]
    group = re.search(r"Could not (?:find|override) '(\w+)[/'@]", text)
    for key in [*keys, *([group[1]] if group else [])]:
        new = renamed_key(key)
        description = describe_old_key(key)
        if description is None or (new is not None and ".modalities." not in new and new not in known_keys(schema)):
            continue
        file = re.search(r"In '([^']+)'", text)
        return f"{file[1]}: {description}" if file else description
    return None
