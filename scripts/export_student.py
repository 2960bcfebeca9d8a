"""The command ``mmdistill export``."""

from mmdistill.cli.export_student import main

if __name__ == "__main__":
    raise SystemExit(main())
