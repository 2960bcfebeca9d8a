"""The command ``mmdistill compute-stats``."""

from mmdistill.cli.compute_stats import main

if __name__ == "__main__":
    raise SystemExit(main())
