"""Start the ranks of a run, detect which launcher started them, and decide which rank reports a failure.

``torchrun``, ``deepspeed`` and ``srun`` start one process per rank and describe its rank in the environment. Under
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
from mmdistill.errors import format_count

INTERRUPTED_EXIT_CODE = 85  # a complete checkpoint was saved after a stop signal; `resume=auto` continues from it
SHUTDOWN_TIMEOUT_S = 10.0  # after a rank has failed, time for the others to end before they are killed
STOP_TIMEOUT_S = 120.0  # the same after a stop signal: the others may still save a checkpoint
EXIT_TIMEOUT_S = 20.0  # after an error, time for the exit handlers of libraries before the process is ended
STORE_TIMEOUT_S = 5.0  # time to wait for an answer of the store, and on rank 0 for the ranks that read it
UNKNOWN_RANK = -1
_PORTS = range(10_000, 30_000)
_single_process = False  # `set_single_process_env` was called
_PARENT = os.getppid()


def set_env_from_slurm() -> None:
    """Set the environment variables that torch reads from those of ``srun``, unless a launcher has set them.

    ``MASTER_ADDR`` is the first host of the job step and ``MASTER_PORT`` is derived from the job ID, unless they are
    set.
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
    """First host of a SLURM node list: ``gpu[003-005,7],x`` -> ``gpu003``."""
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    return first[1] + (first[2] or "") if first else "127.0.0.1"


def launched_externally() -> bool:
    """Whether a launcher (torchrun, deepspeed, srun or `spawn_ranks`) started this process as one of its ranks."""
    return "RANK" in os.environ and not _single_process


def is_nonzero_rank() -> bool:
    """Whether a launcher started this process as a rank other than 0."""
    return launched_externally() and int(os.environ["RANK"]) > 0


def set_single_process_env() -> None:
    """Set the environment variables of a single rank, which libraries require even without a launcher."""
    global _single_process
    _single_process = True
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))


def free_port() -> int:
    """A free port on this machine for rank 0.

    It lies below the range of ephemeral ports, so no outgoing connection takes it before rank 0 binds it.

    Raises:
        ConfigError: 100 random ports were tried and all are in use.
    """
    for _ in range(100):
        port = secrets.choice(_PORTS)  # not seeded: jobs with one seed would choose the same port
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ConfigError(
        f"no free port found: 100 random ports between {_PORTS.start} and {_PORTS.stop - 1} are in use on 127.0.0.1"
    )


def resolve_devices(devices: Any, accelerator: str) -> tuple[int, list[int] | None]:
    """Number of ranks that this process has to start, and the GPUs to use.

    `devices` has the meaning that it has in Lightning: a number of processes; ``auto`` or -1 for all GPUs (on a CPU one
    process); or a list of GPU numbers. Under a launcher no rank is started, and `devices` must be 1, ``auto``, -1 or
    the launcher's number of processes on this machine.

    Returns:
        (1, ...) if this process is the only rank or was started by a launcher. GPU numbers are None if all visible
        GPUs may be used.

    Raises:
        ConfigError: `devices` has another value, or the launcher started another number of processes.
    """
    gpus = list(devices) if isinstance(devices, list | tuple) else None
    if gpus is not None and (not gpus or any(isinstance(g, bool) or not isinstance(g, int) or g < 0 for g in gpus)):
        raise ConfigError(f"devices={devices} must be a number, auto, -1 or a list of GPU numbers")
    if gpus is None and str(devices) not in ("auto", "-1") and (not isinstance(devices, int) or devices < 1):
        raise ConfigError(f"devices={devices} must be a number of at least 1, auto, -1 or a list of GPU numbers")
    if launched_externally():
        local_world_size = int(
            os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        )
        requested = len(gpus) if gpus is not None else devices
        if str(requested) not in ("1", "auto", "-1", str(local_world_size)):
            raise ConfigError(
                f"devices={devices}, but the launcher started {format_count(local_world_size, 'process')} on this "
                "machine; remove devices from the command"
            )
        return 1, None
    if gpus is not None:
        if accelerator == "cpu":
            raise ConfigError(f"devices={devices} are GPU numbers, but accelerator=cpu; use a number of processes")
        return len(gpus), gpus
    if str(devices) in ("auto", "-1"):
        from torch import cuda

        return (max(1, cuda.device_count()) if accelerator != "cpu" else 1), None
    return int(devices), None


def set_visible_devices(gpus: Sequence[int]) -> None:
    """Hide all other GPUs from this process and its children.

    Args:
        gpus: indices into the GPUs that are visible now.

    Raises:
        ConfigError: an index is out of range.
    """
    visible = [g for g in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
    if visible and max(gpus) >= len(visible):
        raise ConfigError(
            f"devices={list(gpus)}, but CUDA_VISIBLE_DEVICES={','.join(visible)} has only "
            f"{format_count(len(visible), 'GPU')}"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[g] if visible else str(g) for g in gpus)


def spawn_ranks(count: int, run_dir: str, *, cwd: str, program: Sequence[str]) -> int:
    """Run `program` with the arguments of the current command as `count` ranks, and wait for them.

    SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are forwarded to all ranks. After a rank has failed, the others have
    `SHUTDOWN_TIMEOUT_S` (after a stop signal `STOP_TIMEOUT_S`) to end, and are then killed.

    Args:
        count: number of ranks.
        run_dir: run directory of all ranks.
        cwd: working directory of the ranks.
        program: arguments of Python that start the command: a script's path, or ``-m`` and a module.

    Returns:
        Exit status of the rank that failed first, or 0.
    """
    escaped = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    arguments = add_overrides(sys.argv[1:], [f"hydra.run.dir='{escaped}'"])
    command = [sys.executable, *program, *arguments]
    common_env = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [
        subprocess.Popen(  # in a new session, so that Ctrl-C reaches a rank once, through `forward_signal`
            command,
            cwd=cwd,
            env={**os.environ, **common_env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(count)
    ]

    def forward_signal(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {
        n: signal.signal(n, forward_signal) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    }
    try:
        return _wait_for_ranks(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait_for_ranks(ranks: list["subprocess.Popen[bytes]"]) -> int:
    """Exit status of the rank that failed first, or 0; 128 + N if signal N killed it."""
    failed, deadline = 0, float("inf")
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]  # of all ranks: one that runs may wait for one that has ended
        bad = [code for code in codes if code]
        if bad and not failed:
            failed = min(bad)  # a killed rank (negative code) is the cause of the other failures
            deadline = time.monotonic() + (STOP_TIMEOUT_S if failed == INTERRUPTED_EXIT_CODE else SHUTDOWN_TIMEOUT_S)
            if failed < 0:
                name = signal.Signals(-failed).name
                print(f"mmdistill: rank {codes.index(failed)} was killed by {name}", file=sys.stderr, flush=True)
        if None not in codes:
            break
        time.sleep(0.1)
    return 128 - failed if failed < 0 else failed


def launcher_exited() -> bool:
    """Whether the launcher of this rank has exited. Ranks then stop, because nobody watches them any more."""
    return launched_externally() and os.getppid() != _PARENT


def reset_sigchld_handler() -> None:
    """Remove the handler of torch that raises an exception, at any line, when a loader worker dies."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def claim_first_failure(job: int) -> int | None:
    """Record this rank as the first that failed in this job, unless another rank already is.

    Ranks that lose their connection fail too, later and with an error that does not name the cause.

    Args:
        job: number of the job in this process; a sweep runs several.

    Returns:
        The rank that failed first. None without a process group. `UNKNOWN_RANK` if the store does not answer, for
        example because rank 0, which keeps it, has exited.
    """
    torch = _torch_in_group()
    if torch is None:
        return None
    rank = torch.distributed.get_rank()
    answers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def claim() -> None:
        with contextlib.suppress(RuntimeError, ValueError):
            store = torch.distributed.distributed_c10d._get_default_store()
            answers.put(int(store.compare_set(f"mmdistill/failed/{job}", "", str(rank))))
            store.add(f"mmdistill/failure_readers/{job}", 1)

    thread = threading.Thread(target=claim, daemon=True)  # a request to the store of a suspended process never returns
    thread.start()
    thread.join(STORE_TIMEOUT_S)
    return UNKNOWN_RANK if answers.empty() else answers.get()


def wait_for_failure_readers(job: int) -> None:
    """On rank 0, which keeps the store, wait until all ranks have called `claim_first_failure`.

    The wait is at most `STORE_TIMEOUT_S` long. The process group is destroyed first, so that ranks that wait for this
    one in a collective fail at once, unless a library keeps the group open. Call this after the error is printed: a
    launcher may end this rank meanwhile.

    Args:
        job: number of the job in this process.
    """
    torch = _torch_in_group()
    if torch is None or torch.distributed.get_rank() > 0:
        return
    world_size, store = torch.distributed.get_world_size(), torch.distributed.distributed_c10d._get_default_store()
    with contextlib.suppress(RuntimeError):  # the launcher may keep the store, and may have exited
        torch.distributed.destroy_process_group()
        gc.collect()  # a group closes its connections when it is freed
        deadline = time.monotonic() + STORE_TIMEOUT_S
        while store.add(f"mmdistill/failure_readers/{job}", 0) < world_size and time.monotonic() < deadline:
            time.sleep(0.05)


def _torch_in_group() -> Any:
    """The module torch if this process has imported it and is in a process group, else None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.distributed.is_initialized() else None


def exit_after_timeout(status: int) -> None:
    """End this process with `status` after `EXIT_TIMEOUT_S` at the latest, even if an exit handler blocks."""
    timer = threading.Timer(EXIT_TIMEOUT_S, os._exit, [status])
    timer.daemon = True
    timer.start()
