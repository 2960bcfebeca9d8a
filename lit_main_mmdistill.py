"""Distill three teachers into one RGB student and evaluate it: ``python lit_main_mmdistill.py``."""

from mmdistill.cli.distill import main

if __name__ == "__main__":
    raise SystemExit(main())
