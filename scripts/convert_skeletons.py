"""The command ``mmdistill convert-skeletons``."""

from mmdistill.cli.convert_skeletons import main

if __name__ == "__main__":
    raise SystemExit(main())
