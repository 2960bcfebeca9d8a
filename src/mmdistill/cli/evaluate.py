"""The command ``mmdistill evaluate``: the job of ``distill`` with ``train=False test=True``. Imports no torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.distill import run_distillation
from mmdistill.cli.entrypoint import exit_with_error, run_entrypoint
from mmdistill.cli.hydra_help import parse_options
from mmdistill.config import ConfigError, DistillConfig
from mmdistill.config.error_messages import describe_misplaced_key
from mmdistill.config.overrides import is_override, quote_overrides, without_option_values

_USAGE = """usage: mmdistill evaluate ckpt_path=PATH [KEY=VALUE ...] [--config-name=NAME] [--config-dir=DIR] [-m]
Measure the few-shot accuracy of a checkpoint. ckpt_path is required. The other keys have the defaults below.
The model comes from the checkpoint. Give the --config-name and dataset of the training."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint few-shot. The overrides in `argv` follow the presets, so they take precedence."""
    given = list(sys.argv[1:] if argv is None else argv)
    if problem := describe_misplaced_key(given, DistillConfig):
        exit_with_error(ConfigError(problem), DistillConfig, "evaluate")
    if (path := _path_without_key(given)) is not None:
        exit_with_error(ConfigError(f"{path}: a checkpoint needs its key: ckpt_path={path}"), DistillConfig, "evaluate")
    try:
        parse_options(quote_overrides(given))  # an option without a value would take the first preset as its value
    except ConfigError as error:
        exit_with_error(error, DistillConfig, "evaluate")
    first = next((i for i, argument in enumerate(given) if is_override(argument)), len(given))
    arguments = [*given[:first], "train=False", "test=True", *given[first:]]
    run_entrypoint(
        run_distillation,
        DistillConfig,
        config_name="config_mmdistill",
        usage=_USAGE,
        verb="evaluate",
        argv=arguments,
    )
    return 0


def _path_without_key(argv: Sequence[str]) -> str | None:
    """The first argument that is a path or a single word, and neither an option nor the value of an option."""
    for _, argument in without_option_values(argv):
        is_setting = is_override(argument) or argument.startswith(("-", "+", "~"))
        if Path(argument).exists() or not is_setting:
            return argument
    return None
