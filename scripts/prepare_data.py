"""The command ``mmdistill prepare``."""

from mmdistill.cli.main import run_verb

if __name__ == "__main__":
    raise SystemExit(run_verb("prepare"))
