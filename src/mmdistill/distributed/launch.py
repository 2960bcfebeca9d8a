"""The processes of a run: who started them, how many, starting them ourselves, and who may say that it failed.

``torchrun``, ``deepspeed`` and ``srun`` start one process per rank and tell each its place in the environment; under
plain ``python`` with ``devices=N`` this module starts the ranks. Imports no torch.
"""

import contextlib
import gc
import os
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from mmdistill.config import ConfigError
from mmdistill.config.overrides import add_overrides

INTERRUPTED_EXIT_CODE = 85  # a whole checkpoint was written after a stop signal; `resume=auto` goes on
_GRACE = 10.0  # seconds that ranks get to end by themselves after one has failed; those stopped by a signal get more
_STOP_GRACE = 120.0
_EXIT_SECONDS = 20.0  # after an error a process that still has not ended, say in a library's exit handler, is cut off
_ASK_SECONDS = 5.0  # that a failed rank waits for the record of failures, and its keeper for those who read it
UNKNOWN_RANK = -1
_PORTS = range(10_000, 30_000)
_single_process = False  # this process made itself a world of one
_PARENT = os.getppid()


def set_env_from_slurm() -> None:
    """Translate what ``srun`` says into the variables that torch reads; nothing where a launcher has set those.

    ``MASTER_ADDR`` is the step's first host and ``MASTER_PORT`` follows from the job's number unless they are set.
    """
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in env:
        return
    per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
    env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
    env.setdefault("LOCAL_WORLD_SIZE", per_node[0] if per_node else env["WORLD_SIZE"])


def _first_host(nodes: str) -> str:
    """``gpu[003-005,7],x`` -> ``gpu003``"""
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return first[1] + (first[2] or "") if first else "127.0.0.1"


def launched_externally() -> bool:
    """Whether a launcher started this process as one of its ranks."""
    return "RANK" in os.environ and not _single_process


def is_nonzero_rank() -> bool:
    """Whether this is another rank than 0."""
    return launched_externally() and int(os.environ["RANK"]) > 0


def set_single_process_env() -> None:
    """Set the variables that libraries ask for where no launcher did."""
    global _single_process
    _single_process = True
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def free_port() -> int:
    """A free port for rank 0, below the range that systems hand out for connections: none takes it until it is bound.

    Raises:
        ConfigError: a hundred ports were tried and all are in use.
    """
    for _ in range(100):
        port = secrets.choice(_PORTS)  # not seeded: jobs with one seed would choose the same port
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(
        f"of ports {_PORTS.start} to {_PORTS.stop - 1} of 127.0.0.1 a hundred were tried, and all are in use"
    )


def resolve_devices(devices: Any, accelerator: str) -> tuple[int, list[int] | None]:
    """What `devices` means here, as Lightning's users know it: (ranks that this process has to start, GPU numbers).

    A number of processes; ``auto`` or -1 (on a CPU one, on GPUs all); a list of GPU numbers. Under a launcher nothing
    is started, and `devices` is 1, auto, -1 or the launcher's own number. One rank is this process: (1, ...).

    Raises:
        ConfigError: not one of these, or the launcher started another number.
    """
    gpus = list(devices) if isinstance(devices, list | tuple) else None
    if gpus is not None and (not gpus or any(isinstance(g, bool) or not isinstance(g, int) or g < 0 for g in gpus)):
        raise ConfigError(f"devices={devices} must be a number, auto, -1 or a list of GPU numbers")
    if gpus is None and str(devices) not in ("auto", "-1") and (not isinstance(devices, int) or devices < 1):
        raise ConfigError(f"devices={devices} must be a number of at least 1, auto, -1 or a list of GPU numbers")
    if launched_externally():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])))
        asked = len(gpus) if gpus is not None else devices
        if str(asked) not in ("1", "auto", "-1", str(here)):
            raise ConfigError(
                f"devices={devices}, but the launcher started {here} processes on this machine; leave devices out"
            )
        return 1, None
    if gpus is not None:
        if accelerator == "cpu":
            raise ConfigError(f"devices={devices} are GPU numbers, but accelerator=cpu; give a number of processes")
        return len(gpus), gpus
    if str(devices) in ("auto", "-1"):
        from torch import cuda

        return (max(1, cuda.device_count()) if accelerator != "cpu" else 1), None
    return int(devices), None


def set_visible_devices(gpus: Sequence[int]) -> None:
    """Let this process and its children see only these GPUs, numbered as they are visible now."""
    seen = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    if seen and max(gpus) >= len(seen):
        raise ConfigError(f"devices={list(gpus)}, but CUDA_VISIBLE_DEVICES={','.join(seen)} shows {len(seen)} GPUs")
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(seen[g] if seen else str(g) for g in gpus)


def spawn_ranks(count: int, run_dir: str, *, cwd: str, program: Sequence[str]) -> int:
    """Run this very command as `count` ranks in the folder `run_dir`; the exit status of the first that failed, or 0.

    Signals are passed on. When one rank fails the others get some seconds, then they are killed: none is left behind.
    """
    escaped = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    arguments = add_overrides(sys.argv[1:], [f"hydra.run.dir='{escaped}'"])
    command = [sys.executable, *program, *arguments]
    place = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(  # a session of its own: the terminal's Ctrl-C comes once, through us
            command,
            cwd=cwd,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(count)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: list["subprocess.Popen[bytes]"]) -> int:
    failed, deadline = 0, float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]  # of all: the second may have ended while the first waits for it
        bad = [code for code in codes if code]
        if bad and not failed:
            failed = min(bad)  # a killed rank (negative) is why the others failed
            deadline = time.monotonic() + (_STOP_GRACE if failed == INTERRUPTED_EXIT_CODE else _GRACE)
            if failed < 0:
                cause = f"rank {codes.index(failed)} was ended by {signal.Signals(-failed).name}"
                print(f"mmdistill: {cause}", file=sys.stderr, flush=True)
        if None not in codes:
            break
        time.sleep(0.1)
    return 128 - failed if failed < 0 else failed


def launcher_exited() -> bool:
    """Whether the launcher is gone: its ranks would train on unseen, so they treat this as a wish to stop."""
    return launched_externally() and os.getppid() != _PARENT


def reset_sigchld_handler() -> None:
    """From now on the death of a loader worker raises nothing: torch's handler does that wherever this process is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def claim_first_failure(job: int) -> int | None:
    """The rank that failed first in this process's `job`-th run; this rank claims that if none did.

    Ranks that lose their peer fail too, later and with an error that explains nothing. None: there is no process group
    yet; `UNKNOWN_RANK`: the rank that keeps the record has ended without one, or does not answer.
    """
    torch = _torch_in_group()
    if torch is None:
        return None
    rank = torch.distributed.get_rank()
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask() -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            store = torch.distributed.distributed_c10d._get_default_store()
            answers.put(int(store.compare_set(f"mmdistill/failed/{job}", "", str(rank))))
            store.add(f"mmdistill/asked/{job}", 1)

    asking = threading.Thread(target=ask, daemon=True)  # a suspended process answers nothing, and the store just waits
    asking.start()
    asking.join(_ASK_SECONDS)
    return UNKNOWN_RANK if answers.empty() else answers.get()


def wait_for_failure_readers(job: int) -> None:
    """The rank that keeps the record of `claim_first_failure` stays, at most some seconds, until all ranks have read it.

    It leaves the process group first: where no library keeps that open, ranks that wait in a collective for this one
    fail at once, and ask. Call it when everything is said: a launcher may stop this rank meanwhile.
    """
    torch = _torch_in_group()
    if torch is None or torch.distributed.get_rank() > 0:
        return
    world, store = torch.distributed.get_world_size(), torch.distributed.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # a launcher may keep the store, and be gone
        torch.distributed.destroy_process_group()
        gc.collect()  # a group closes its connections when nothing refers to it any more
        deadline = time.monotonic() + _ASK_SECONDS
        while store.add(f"mmdistill/asked/{job}", 0) < world and time.monotonic() < deadline:
            time.sleep(0.05)


def _torch_in_group() -> Any:
    """torch, if this process has imported it and is in a process group."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.distributed.is_initialized() else None


def exit_after_timeout(status: int) -> None:
    """End this process in a bounded time whatever libraries do at exit."""
    timer = threading.Timer(_EXIT_SECONDS, os._exit, [status])
    timer.daemon = True
    timer.start()
