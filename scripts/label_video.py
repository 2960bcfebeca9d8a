"""The command ``mmdistill label``."""

from mmdistill.cli.label import main

if __name__ == "__main__":
    raise SystemExit(main())
