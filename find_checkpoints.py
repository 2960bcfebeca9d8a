"""List the checkpoints below a folder: ``python find_checkpoints.py output``."""

from mmdistill.cli.main import run_verb

if __name__ == "__main__":
    raise SystemExit(run_verb("find-checkpoints"))
