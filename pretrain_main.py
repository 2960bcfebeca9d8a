"""Pretrain one VideoMAE on one modality: ``python pretrain_main.py modality=rgb``."""

from mmdistill.cli.entrypoint import run_entrypoint
from mmdistill.config import PretrainConfig


def job(config: PretrainConfig, run_dir: str) -> None:
    """One run, after its config is valid (torch is imported only here)."""
    from pathlib import Path

    from mmdistill.pretrain import pretrain

    pretrain(config, Path(run_dir))


if __name__ == "__main__":
    run_entrypoint(job, PretrainConfig, config_name="config_pretrain")
