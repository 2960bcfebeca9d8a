"""Pretrain one VideoMAE on one modality: ``python pretrain_main.py modality=rgb``."""

from mmdistill.cli.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
