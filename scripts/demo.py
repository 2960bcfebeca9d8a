"""The command ``mmdistill demo``."""

from mmdistill.cli.demo import main

if __name__ == "__main__":
    raise SystemExit(main())
