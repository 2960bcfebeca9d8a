"""Runs Python commands for tests in forks of one process that has imported the heavy libraries already.

Importing torch, DeepSpeed, Lightning and timm takes about 7 s of CPU time per command. A command that runs in a fork
starts in milliseconds, and is a process of its own in every other respect: own environment, working directory, output
and exit status. Tests of launchers start real interpreters instead.

Protocol, one JSON object per line: the client writes ``{argv, cwd, env, stdout, stderr}`` (output goes to these files),
the server answers ``{"pid": n}`` when the command has started and ``{"status": n}`` when it has ended.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

PRELOADED = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # imports torch's compiler, which ZeRO needs
    "matplotlib.backends.backend_agg",
    "pytorch_lightning",
    "tensorboard.compat.proto.event_pb2",
    "torch.utils.tensorboard",
    "mmdistill.pretrain",
    "mmdistill.distill",
    "mmdistill.evaluation.run",
    "sklearn.linear_model",
)


class ForkServer:
    """One server process; `run` starts a command in it and waits for its end."""

    def __init__(self, root: Path, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fork_server"],
            cwd=root,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()

    def run(
        self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float
    ) -> "subprocess.CompletedProcess[str]":
        """``python argv...``; argv starts with a script or with ``-m module``.

        Raises:
            subprocess.TimeoutExpired: the command was killed after `timeout` seconds.
        """
        with self._lock, tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            self._write({"argv": list(argv), "cwd": str(cwd), "env": dict(env), "stdout": str(out), "stderr": str(err)})
            pid = self._read()["pid"]
            timer = threading.Timer(timeout, os.kill, (pid, signal.SIGKILL))
            timer.start()
            status = self._read()["status"]
            in_time = timer.is_alive()
            timer.cancel()
            output, errors = out.read_text(errors="replace"), err.read_text(errors="replace")
        if not in_time:
            raise subprocess.TimeoutExpired(list(argv), timeout, output, errors)
        return subprocess.CompletedProcess(list(argv), status, output, errors)

    def close(self) -> None:
        """End the server."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)

    def _write(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the fork server ended with status {self._process.wait()}")
        message: dict[str, int] = json.loads(line)
        return message


def _run_command(command: dict[str, object]) -> int:
    """In the forked child: become the command; its exit status."""
    argv = [str(a) for a in command["argv"]]  # type: ignore[attr-defined]
    for name, target in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(str(command[name]), os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    os.chdir(str(command["cwd"]))
    os.environ.clear()
    os.environ.update(command["env"])  # type: ignore[call-overload]
    from mmdistill.distributed import launch

    launch._PARENT = os.getppid()
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _serve() -> None:
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would copy the pages of all these objects
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            answers = None  # type: ignore[assignment]
            raise _Forked(json.loads(line))
        answers.write(json.dumps({"pid": pid}) + "\n")
        answers.flush()
        _, status = os.waitpid(pid, 0)
        answers.write(json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n")
        answers.flush()


def _exit_without_teardown(status: int) -> None:
    """Exit after what a normal exit runs, without deleting all modules: that takes 2.5 s of CPU time per command."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Forked(BaseException):
    """Unwinds the server's stack in the child, so that the command runs at the top."""


if __name__ == "__main__":
    try:
        _serve()
    except _Forked as forked:
        (message,) = forked.args
    else:
        sys.exit(0)
    _exit_without_teardown(_run_command(message))
