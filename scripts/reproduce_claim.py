"""The command ``mmdistill results-table``."""

from mmdistill.cli.results_table import main

if __name__ == "__main__":
    raise SystemExit(main())
