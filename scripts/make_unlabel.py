"""The command ``mmdistill make-unlabel``."""

from mmdistill.cli.make_unlabel import main

if __name__ == "__main__":
    raise SystemExit(main())
