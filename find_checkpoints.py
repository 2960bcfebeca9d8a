"""List the checkpoints below a folder: ``python find_checkpoints.py output``."""

from mmdistill.cli.find_checkpoints import main

if __name__ == "__main__":
    raise SystemExit(main())
