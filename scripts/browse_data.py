"""The command ``mmdistill browse``."""

from mmdistill.cli.browse import main

if __name__ == "__main__":
    raise SystemExit(main())
