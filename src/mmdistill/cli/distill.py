"""The command ``mmdistill distill`` and the script ``lit_main_mmdistill.py``. Imports no torch."""

import shlex
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig

from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.config import DistillConfig

_DEFAULT_CONFIG = "config_mmdistill"
# Keys of a command that the evaluation of its checkpoint does not have. A file of `experiment` starts a sweep.
_TRAINING_KEYS = ("train", "test", "resume", "ckpt_path", "trainer", "experiment")


def run_distillation(config: DistillConfig, run_dir: str) -> None:
    """Distill if `train` is set, evaluate if `test` is set. torch is imported here, after the config is valid."""
    from pathlib import Path

    checkpoint, options = config.ckpt_path, {}
    if config.train:
        from mmdistill.distill import distill
        from mmdistill.evaluation.run import check_evaluation

        if config.test:
            check_evaluation(config)
        checkpoint = str(distill(config, Path(run_dir)))
        options["stop_hint"] = f"the training is complete; evaluate it with\n{evaluation_command(checkpoint, run_dir)}"
    if config.test and checkpoint:
        from mmdistill.evaluation.run import evaluate_checkpoint

        evaluate_checkpoint(config, checkpoint, Path(run_dir), **options)


def evaluation_command(checkpoint: str, run_dir: str) -> str:
    """The command that evaluates the checkpoint of the current Hydra job into its folder, with the job's settings."""
    settings = []
    if HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        sources = [s for s in hydra_config.runtime.config_sources if s.provider == "command-line"]
        settings += [f"--config-dir={s.path}" for s in sources]
        if hydra_config.job.config_name != _DEFAULT_CONFIG:
            settings.append(f"--config-name={hydra_config.job.config_name}")
        for override in hydra_config.overrides.task:
            key = override.lstrip("+~").partition("=")[0]
            if key.partition(".")[0] not in _TRAINING_KEYS:
                settings.append(override)
    arguments = [*settings, f"ckpt_path={checkpoint}", f"hydra.run.dir={run_dir}"]
    return shlex.join(["mmdistill", "evaluate", *arguments])


def main(argv: Sequence[str] | None = None) -> int:
    """Compose the config from `argv`, then distill and evaluate; see `run_entrypoint`."""
    run_entrypoint(run_distillation, DistillConfig, config_name=_DEFAULT_CONFIG, verb="distill", argv=argv)
    return 0
