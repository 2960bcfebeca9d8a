"""Import every module, then read, export and evaluate, without what Windows does not have. Run in a forked process.

python -m tests.integration.windows_worker CHECKPOINT OUTPUT EVALUATION_ARGUMENT...
"""

import enum
import errno
import importlib
import os
import pkgutil
import select
import shutil
import signal
import sys
from multiprocessing import resource_tracker
from typing import Any

MODULES = ("resource", "fcntl", "pwd", "grp", "termios")
OS = ("fork", "forkpty", "preadv", "pread", "pwritev", "posix_fadvise", "sched_getaffinity", "geteuid", "getuid",
      "killpg", "setsid", "getpgid", "O_DIRECTORY", "statvfs", "uname", "getloadavg")  # fmt: skip
SIGNALS = ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGALRM", "SIGSTOP", "SIGXFSZ")


def remove_names() -> None:
    """Remove modules, functions and signals, and refuse to sync folders and files that are open for reading."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mmdistill"]:
        del sys.modules[name]  # imported by the process that was forked
    sys.modules.update(dict.fromkeys(MODULES))  # type: ignore[arg-type]  # None: the import fails
    for name in OS:
        if hasattr(os, name):
            delattr(os, name)
    kept = {s.name: s for s in signal.Signals if s.name not in SIGNALS}
    signal.Signals = enum.IntEnum("Signals", kept)  # type: ignore[assignment, misc]
    for name in (*SIGNALS, "pthread_sigmask", "sigwait"):
        delattr(signal, name)
    del select.poll
    resource_tracker._HAVE_SIGMASK = False  # type: ignore[attr-defined]
    shutil._use_fd_functions = False  # type: ignore[attr-defined]
    open_file, fsync = os.open, os.fsync
    readable: set[int] = set()

    def open_for_windows(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = open_file(path, flags, *arguments, **options)
        (readable.discard if flags & (os.O_WRONLY | os.O_RDWR) else readable.add)(handle)
        return handle

    def fsync_for_windows(handle: int) -> None:
        if handle in readable:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    os.open, os.fsync = open_for_windows, fsync_for_windows


def main(checkpoint: str, output: str, *evaluation: str) -> int:
    """Run all commands; returns the status of the last one."""
    remove_names()
    import mmdistill

    for module in pkgutil.walk_packages(mmdistill.__path__, "mmdistill."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    from mmdistill.cli.main import main as run

    for arguments in (
        ("inspect", checkpoint),
        ("find-checkpoints", output),
        ("export", checkpoint, "--to", "hf", "--out", f"{output}/hf"),
        ("evaluate", f"ckpt_path={checkpoint}", *evaluation),
    ):
        status = run(arguments)
        if status:
            return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
