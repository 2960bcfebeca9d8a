"""The command ``mmdistill spot``."""

from mmdistill.cli.spot import main

if __name__ == "__main__":
    raise SystemExit(main())
