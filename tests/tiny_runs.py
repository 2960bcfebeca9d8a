"""Trainings on tiny data as processes, forked from a process that has imported the libraries: for benchmarks/."""

import atexit
import faulthandler
import os
import runpy
import sys
import tempfile
import threading
import uuid
from pathlib import Path

from mmdistill.console import COMMAND_ID
from tests.commands import ROOT
from tests.ranks import fork_ranks
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides, write_teacher

SCRIPTS = {"pretrain": "pretrain_main.py", "distill": "lit_main_mmdistill.py"}


def training_command(training: str, root: Path, *more: str) -> list[str]:
    """Script and arguments of a training on tiny data in `root`, which is created at the first call."""
    data = root / "data"
    if not data.exists():
        make_tiny(data)
    own = ["modality=flow", *MODEL]
    if training == "distill":
        names = ("rgb", "flow", "skeleton")
        paths = [root / f"teacher_{name}" for name in names]
        for seed, (path, name) in enumerate(zip(paths, names, strict=True)):
            if not path.exists():
                write_teacher(path, name, seed)
        own = [f"trainer.ckpt_path=[{','.join(map(str, paths))}]", "test=False"]
    return [SCRIPTS[training], *own, *overrides(data), *EVAL, "accelerator=cpu", "trainer.save_ckpt_freq=1", *more]


def start_training(command: list[str], *, ranks: int, log: Path, temporary: Path) -> list[int]:
    """Start the ranks of a training, each in a session of its own; their process ids."""

    def run(rank: int) -> int:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(ROOT)
        faulthandler.enable()  # prints where the process is if SIGABRT ends it
        # Python would look for the folder with a test file, which remains if SIGKILL ends the process meanwhile
        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        os.environ[COMMAND_ID] = f"mmdistill-log-{os.getpid()}-{uuid.uuid4().hex}"
        sys.argv = command
        status = 0
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        return status

    return fork_ranks(ranks, run)
