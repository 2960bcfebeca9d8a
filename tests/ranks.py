"""Ranks forked from a process that has imported everything already: seconds less for each."""

import os
import sys
import traceback
from collections.abc import Callable

from mmdistill.distributed import launch


def import_zero() -> None:
    """What DeepSpeed imports only when ZeRO starts, torch's compiler among it: 2 to 3 seconds, once for all forks."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401


def fork_ranks(world: int, job: Callable[[int], int | None]) -> list[int]:
    """Processes that run ``job(rank)`` where a launcher would have started them, and exit with what it returns (None:
    0), or with 1 if it raises; their ids, for `wait_for`."""
    port, pids = launch.free_port(), []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
                os.environ.update({name: str(value) for name, value in place.items()})
                launch._PARENT = os.getppid()  # a rank's launcher is the process that forked it
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
    """Exit codes; minus the signal's number where one ended it."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
