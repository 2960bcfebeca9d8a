"""The command ``mmdistill convert``."""

from mmdistill.cli.convert_checkpoint import main

if __name__ == "__main__":
    raise SystemExit(main())
