"""The command ``mmdistill sweep-summary``."""

from mmdistill.cli.summarize_sweep import main

if __name__ == "__main__":
    raise SystemExit(main())
