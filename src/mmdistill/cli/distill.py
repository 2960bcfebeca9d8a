"""The command ``mmdistill distill`` and the script ``lit_main_mmdistill.py``. Imports no torch."""

import sys
from collections.abc import Sequence

from mmdistill.cli import imports_without_collections
from mmdistill.cli.entrypoint import exit_with_error, run_entrypoint
from mmdistill.config import ConfigError, DistillConfig
from mmdistill.config.error_messages import describe_misplaced_key

_USAGE = """usage: mmdistill distill|evaluate [KEY=VALUE ...] [--config-name=NAME] [--config-dir=DIR] [-m]
Distill pretrained teachers into an RGB student (train=True) and evaluate it few-shot (test=True)."""


def run_distillation(config: DistillConfig, run_dir: str) -> None:
    """Distill if `train` is set, evaluate if `test` is set. torch is imported here, after the config is valid."""
    from pathlib import Path

    checkpoint, options = config.ckpt_path, {}
    if config.train:
        with imports_without_collections():
            from mmdistill.cli.find_checkpoints import evaluation_command_of_run
            from mmdistill.distill import distill
            from mmdistill.distill.teachers import check_paths
            from mmdistill.evaluation.run import check_evaluation

        check_paths(config)  # before the demo data are rendered
        if config.test:
            check_evaluation(config)
        checkpoint = str(distill(config, Path(run_dir)))
        command = evaluation_command_of_run(Path(checkpoint), Path(run_dir))
        options["stop_hint"] = f"the training is complete; evaluate it with\n{command}"
    if config.test and checkpoint:
        with imports_without_collections():
            from mmdistill.evaluation.run import evaluate_checkpoint

        evaluate_checkpoint(config, checkpoint, Path(run_dir), **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Compose the config from `argv`, then distill and evaluate; see `run_entrypoint`."""
    given = sys.argv[1:] if argv is None else argv
    if problem := describe_misplaced_key(given, DistillConfig):
        exit_with_error(ConfigError(problem), DistillConfig, "distill")
    run_entrypoint(
        run_distillation, DistillConfig, config_name="config_mmdistill", usage=_USAGE, verb="distill", argv=argv
    )
    return 0
