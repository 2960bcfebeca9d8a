"""The verbs of ``mmdistill``: one module each, with ``main(argv) -> exit status``."""

import atexit
import gc

# The last garbage collections of Python visit each object of torch and DeepSpeed, which takes 1 s per process.
atexit.register(gc.freeze)
