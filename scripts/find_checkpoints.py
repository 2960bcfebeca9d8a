"""The command ``mmdistill find-checkpoints``."""

from mmdistill.cli.find_checkpoints import main

if __name__ == "__main__":
    raise SystemExit(main())
