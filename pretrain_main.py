"""Pretrain one VideoMAE on one modality: ``python pretrain_main.py modality=rgb``."""

from mmdistill.cli.main import run_verb

if __name__ == "__main__":
    raise SystemExit(run_verb("pretrain"))
