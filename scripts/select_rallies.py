"""The command ``mmdistill select-rallies``."""

from mmdistill.cli.select_rallies import main

if __name__ == "__main__":
    raise SystemExit(main())
