"""The command ``mmdistill visualize``."""

from mmdistill.cli.visualize_reconstruction import main

if __name__ == "__main__":
    raise SystemExit(main())
