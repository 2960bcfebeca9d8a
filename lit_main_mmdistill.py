"""Distill three teachers into one RGB student and evaluate it: ``python lit_main_mmdistill.py``."""

from mmdistill.cli.main import run_verb

if __name__ == "__main__":
    raise SystemExit(run_verb("distill"))
