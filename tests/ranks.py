"""Ranks that are forked from a process which has imported everything: each starts seconds faster."""

import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable

from mmdistill.distributed import launch


def import_zero() -> None:
    """Import what DeepSpeed imports when ZeRO starts, such as torch's compiler: 2 to 3 s, once for all forks."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def free_port() -> int:
    """A port that no process of this machine uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fork_ranks(world: int, job: Callable[[int], int | None]) -> list[int]:
    """Start processes that run ``job(rank)`` in the environment that a launcher would set.

    A process exits with the job's result (None: 0), or with 1 if the job raises. Returns the process ids, for
    `wait_for`.
    """
    port, pids = free_port(), []
    gc.freeze()  # a collection in a child would copy the pages of all these objects
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
                os.environ.update({name: str(value) for name, value in environment.items()})
                launch._PARENT = os.getppid()  # the launcher of a rank is the process that forked it
                code = job(rank) or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return pids


def wait_for(pids: list[int]) -> list[int]:
    """Exit codes; -N for a process that signal N ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
