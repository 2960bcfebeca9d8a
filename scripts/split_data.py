"""The command ``mmdistill split-data``."""

from mmdistill.cli.split_data import main

if __name__ == "__main__":
    raise SystemExit(main())
