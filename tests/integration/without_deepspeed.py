"""Runs a script in a process that cannot import DeepSpeed: without_deepspeed.py SCRIPT ARGUMENTS..."""

import runpy
import sys
from types import ModuleType


class _Blocked:
    """Finds no module of DeepSpeed, and is asked before all other finders."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] == "deepspeed":
            raise AssertionError(f"{name} is imported")


if __name__ == "__main__":
    for loaded in list(sys.modules):  # by the process that has forked this one
        if loaded.partition(".")[0] in ("deepspeed", "mmdistill"):
            del sys.modules[loaded]
    sys.meta_path.insert(0, _Blocked())  # type: ignore[arg-type]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
