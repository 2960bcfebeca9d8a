"""The command ``mmdistill inspect``."""

from mmdistill.cli.inspect_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
