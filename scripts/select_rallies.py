"""The command ``mmdistill select-rallies``."""

from mmdistill.cli.main import run_verb

if __name__ == "__main__":
    raise SystemExit(run_verb("select-rallies"))
