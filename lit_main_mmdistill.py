"""Distil three teachers into one RGB student, and evaluate it few-shot: ``python lit_main_mmdistill.py``."""

from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.config import DistillConfig


def job(config: DistillConfig, run_dir: str) -> None:
    """One run, after its config is valid (torch is imported only here)."""
    from pathlib import Path

    checkpoint = config.ckpt_path
    if config.train:
        from mmdistill.distill import distill
        from mmdistill.evaluation.run import check_evaluation

        if config.test:
            check_evaluation(config)
        checkpoint = str(distill(config, Path(run_dir)))
    if config.test and checkpoint:
        from mmdistill.evaluation.run import evaluate_checkpoint

        evaluate_checkpoint(config, checkpoint, Path(run_dir))


if __name__ == "__main__":
    run_entrypoint(job, DistillConfig, config_name="config_mmdistill")
