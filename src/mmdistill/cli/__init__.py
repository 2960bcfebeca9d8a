"""Command line: the verbs of ``mmdistill``. Each module has ``main(argv) -> exit status``."""
