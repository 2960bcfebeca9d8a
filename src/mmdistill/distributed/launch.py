"""Detect which launcher started this process, start the ranks of ``devices=N``, and report which rank failed first.

``torchrun``, ``deepspeed`` and ``srun`` start one process per rank and describe its rank in the environment. Under
plain ``python`` with ``devices=N`` the elastic agent of torch starts the ranks. Importing this module imports no torch.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from mmdistill.config import ConfigError
from mmdistill.config.overrides import add_overrides
from mmdistill.console import program_name
from mmdistill.distributed.stop_signals import INTERRUPTED_EXIT_CODE as INTERRUPTED_EXIT_CODE
from mmdistill.distributed.stop_signals import KEYBOARD_INTERRUPT_EXIT_CODE as KEYBOARD_INTERRUPT_EXIT_CODE
from mmdistill.distributed.stop_signals import signal_handler
from mmdistill.errors import format_count
from mmdistill.files import atomic_write_bytes, temporary_folder

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

EXIT_TIMEOUT_S = 20.0  # after an error, time for the exit handlers of libraries before the process is ended
KILL_TIMEOUT_S = 30  # after a rank has failed, the elastic agent sends SIGTERM to the others, and SIGKILL 30 s later
RUN_ID = "mmdistill"  # TORCHELASTIC_RUN_ID of ranks that `run_ranks` started
_ANY_PORT = "0"  # MASTER_PORT of `set_single_process_env`; a launcher sets the port that it has chosen
_RUN_ID_VARIABLE = "MMDISTILL_RUN_ID"
_PARENT = os.getppid()


def set_env_from_slurm() -> None:
    """Set the environment variables that torch reads from those of ``srun``, unless a launcher has set them.

    ``MASTER_ADDR`` is the first host of the job step, and ``MASTER_PORT`` is derived from the numbers of the job and of
    the step, unless they are set. ``MMDISTILL_RUN_ID`` names job, step and restart.
    """
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2 or "SLURM_PROCID" not in env:
        return
    job, step, restart = (env.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT"))
    per_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
    env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))))
    env.setdefault("MASTER_PORT", str(_slurm_port(int(job), int(step))))
    env.setdefault(_RUN_ID_VARIABLE, f"SLURM job {job} step {step} restart {restart}")
    env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
    env.setdefault("LOCAL_WORLD_SIZE", per_node[0] if per_node else env["WORLD_SIZE"])


def _slurm_port(job: int, step: int) -> int:
    """A port below the range from which Linux gives ports to clients; jobs and steps near each other differ."""
    return 10000 + (101 * job + step) % 20000


def _first_host(nodes: str) -> str:
    """First host of a SLURM node list: ``gpu[003-005,7],x`` -> ``gpu003``, ``c[1-2]n[3,4].lab`` -> ``c1n3.lab``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0] if first else "") or "127.0.0.1"


def get_run_id() -> str:
    """Name of this start of the run, the same on all ranks; empty if the launcher (srun or torchrun) gives none."""
    return os.environ.get(_RUN_ID_VARIABLE) or os.environ.get("TORCHELASTIC_RUN_ID", "")


def launched_externally() -> bool:
    """Whether a launcher (torchrun, deepspeed, srun or `run_ranks`) started this process as one of its ranks."""
    return "RANK" in os.environ and os.environ.get("MASTER_PORT") != _ANY_PORT


def is_nonzero_rank() -> bool:
    """Whether a launcher started this process as a rank other than 0."""
    return launched_externally() and int(os.environ["RANK"]) > 0


def set_single_process_env() -> None:
    """Set the environment variables of a single rank, which libraries require even without a launcher."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_ANY_PORT)


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
    use_all = str(devices) in ("auto", "-1")
    numbers, minimum = ([devices], 1) if gpus is None else (gpus, 0)
    if not use_all and not (numbers and all(type(n) is int and n >= minimum for n in numbers)):
        raise ConfigError(f"devices={devices} must be a number of at least 1, auto, -1 or a list of GPU numbers")
    if launched_externally():
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
        local_world_size = int(next(os.environ[name] for name in names if name in os.environ))
        requested = len(gpus) if gpus is not None else devices
        if not use_all and str(requested) not in ("1", str(local_world_size)):
            raise ConfigError(
                f"devices={devices}, but the launcher started {format_count(local_world_size, 'process')} on this "
                "machine; remove devices from the command"
            )
        return 1, None
    if gpus is not None:
        if accelerator == "cpu":
            raise ConfigError(f"devices={devices} are GPU numbers, but accelerator=cpu; use a number of processes")
        return len(gpus), gpus
    if use_all:
        from torch import cuda

        return (max(1, cuda.device_count()) if accelerator != "cpu" else 1), None
    return int(devices), None


def set_visible_devices(gpus: Sequence[int]) -> None:
    """Hide all other GPUs from this process and its children. `gpus` are indices into those that are visible now.

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


def run_ranks(count: int, run_dir: str, *, program: Sequence[str]) -> int:
    """Run `program` with the arguments of the current command as `count` ranks, and wait for them.

    SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are forwarded to all ranks. After a rank has failed, the others have
    `KILL_TIMEOUT_S` to end. The first failure is printed.

    Args:
        count: number of ranks.
        run_dir: run directory of all ranks.
        program: arguments of Python that start the command: a script's path, or ``-m`` and a module.

    Returns:
        Exit status of the rank that failed first, or 0; 128 + N if signal N killed it.
    """
    import psutil
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def forward_signal(number: int, frame: FrameType | None) -> None:
        ranks = set(psutil.Process().children()) - other_children
        if not ranks and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not ranks:
            print(f"{program_name()}: stopped by a signal; run the same command again", file=sys.stderr, flush=True)
            raise SystemExit(INTERRUPTED_EXIT_CODE)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    other_children = set(psutil.Process().children())
    escaped = run_dir.replace("\\", "\\\\").replace("'", "\\'")
    arguments = [*program, *add_overrides(sys.argv[1:], [f"hydra.run.dir='{escaped}'"])]
    with (
        signal_handler(("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"), forward_signal),
        temporary_folder() as error_dir,
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=RUN_ID,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=error_dir),
            signals_to_handle="",  # the agent's handler would discard the exit status of the ranks
        )
        logging.disable(logging.ERROR)  # the agent logs each step of a shutdown
        try:
            elastic_launch(config, sys.executable)(*(a.replace("$", "$$") for a in arguments))  # it expands templates
        except ChildFailedError as error:
            return report_first_failure(error.failures)
        finally:
            logging.disable(logging.NOTSET)
    return 0


def report_first_failure(failures: "Mapping[int, ProcessFailure]") -> int:
    """Print the failure that caused the others, and return the exit status of its rank; 128 + N after signal N.

    A rank that was killed is the cause, unless the agent killed it because it did not end. Otherwise the first record
    of `record_failure` is, because ranks that lose their connection to the failed one fail later.
    """
    first_time = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        is_late = failure.timestamp - first_time >= KILL_TIMEOUT_S
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and not is_late:
            name = signal.Signals(-failure.exitcode).name
            print(f"mmdistill: rank {rank} was killed by {name}", file=sys.stderr, flush=True)
            return 128 - failure.exitcode
    recorded = {rank: f.error_file_data for rank, f in failures.items() if "time_s" in f.error_file_data}
    if not recorded:
        first = next(iter(failures.values()))
        return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
    rank, record = min(recorded.items(), key=lambda item: float(item[1]["time_s"]))
    text = record["message"]["extraInfo"]["py_callstack"]
    if record["status"] == KEYBOARD_INTERRUPT_EXIT_CODE:
        print(text, file=sys.stderr, flush=True)
    elif record["status"] != INTERRUPTED_EXIT_CODE:
        print(f"mmdistill: rank {rank} failed first:\n{text}", file=sys.stderr, flush=True)
    return int(record["status"])


def record_failure(text: str, status: int) -> bool:
    """Write why this rank ends, and with which status, to the file that the elastic agent reads, if one started it.

    Returns:
        Whether `report_first_failure` prints the text if this rank is the first. torchrun prints its own report.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        now = time.time()
        info = {"timestamp": str(int(now)), "py_callstack": text}
        record = {"message": {"message": text, "extraInfo": info}, "time_s": now, "status": status}
        atomic_write_bytes(Path(path), json.dumps(record).encode())  # the agent may end this rank meanwhile
    return bool(path) and os.environ.get("TORCHELASTIC_RUN_ID") == RUN_ID


def launcher_exited() -> bool:
    """Whether the launcher of this rank has exited. Ranks then stop, because nobody watches them any more."""
    return launched_externally() and os.getppid() != _PARENT


def reset_sigchld_handler() -> None:
    """Remove the handler of torch that raises an exception, at any line, when a loader worker dies."""
    if hasattr(signal, "SIGCHLD"):  # Windows has none
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def exit_after_timeout(status: int) -> None:
    """End this process with `status` after `EXIT_TIMEOUT_S` at the latest, even if an exit handler blocks."""
    timer = threading.Timer(EXIT_TIMEOUT_S, os._exit, [status])
    timer.daemon = True
    timer.start()
