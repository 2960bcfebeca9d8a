"""The command ``mmdistill evaluate-features``."""

from mmdistill.cli.evaluate_features import main

if __name__ == "__main__":
    raise SystemExit(main())
