"""The command ``mmdistill evaluate``: the job of ``distill`` with ``train=False test=True``. Imports no torch."""

import sys
from collections.abc import Sequence

from mmdistill.cli.distill import run_distillation
from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.config import DistillConfig
from mmdistill.config.overrides import is_override

_USAGE = """usage: mmdistill evaluate ckpt_path=PATH [KEY=VALUE ...] [--config-name=NAME] [--config-dir=DIR] [-m]
Measure the few-shot accuracy of a checkpoint. ckpt_path is required. The other keys have the defaults below.
The model comes from the checkpoint. Give the --config-name and dataset of the training.
docs/config.md describes the keys."""


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint few-shot. The overrides in `argv` follow the presets, so they take precedence."""
    given = list(sys.argv[1:] if argv is None else argv)
    first = next((i for i, argument in enumerate(given) if is_override(argument)), len(given))
    presets = ["train=False", "test=True"]
    if "--help" in given or "-h" in given:
        presets += ["hydra.help.app_name=mmdistill evaluate", f"hydra.help.header={_USAGE}"]
    arguments = [*given[:first], *presets, *given[first:]]
    run_entrypoint(run_distillation, DistillConfig, config_name="config_mmdistill", verb="evaluate", argv=arguments)
    return 0
