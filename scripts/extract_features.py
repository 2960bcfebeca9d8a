"""The command ``mmdistill features``."""

from mmdistill.cli.extract_features import main

if __name__ == "__main__":
    raise SystemExit(main())
