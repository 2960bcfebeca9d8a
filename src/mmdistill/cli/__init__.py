"""The verbs of ``mmdistill``: one module each, with ``main(argv) -> exit status``."""

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The last garbage collections of Python visit each object of torch and DeepSpeed, which takes 1 s per process.
atexit.register(gc.freeze)


@contextmanager
def imports_without_collections() -> Iterator[None]:
    """While open, no garbage collection runs, and later ones do not visit the objects of modules that it has imported.

    The imports of torch, DeepSpeed and Lightning create millions of objects and no garbage. Collections would take a
    fifth of their time.
    """
    num_modules = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        if len(sys.modules) > num_modules:  # otherwise this would keep the garbage of the last job of a sweep
            gc.freeze()
