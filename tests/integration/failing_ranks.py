"""Two ranks of an entrypoint whose job fails: python -m tests.integration.failing_ranks FOLDER CASE...

A CASE is ``NAME:WHO:WHAT:HOW``. Rank WHO (or ``all``) raises WHAT (``nan``: an error that every rank raises;
``input``: wrong input on one rank; ``defect``: an unexpected error); the other ranks wait for it in a collective. HOW
is what a rank does before it records its failure: ``late1=S``: rank 1 sleeps S seconds; ``stop0`` and ``stop1``: that
rank is suspended; ``worker1``: a loader worker of rank 1 dies at the same time. All cases run at the same time.

FOLDER/NAME.log is the output of the ranks. FOLDER/NAME.json has ``ends``, for each rank its exit code and the seconds
from its failure to its end (None for a suspended rank), and ``text`` and ``status`` of `launch.report_first_failure`.
"""

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from mmdistill.cli import entrypoint as cli
from mmdistill.config import PretrainConfig
from mmdistill.distributed import launch
from mmdistill.distributed.process import start_process
from mmdistill.errors import InputError
from mmdistill.training.nonfinite import NonFiniteError
from tests.ranks import fork_ranks, wait_for

ERRORS = {"nan": NonFiniteError("loss is nan"), "input": InputError("a wrong path"), "defect": TypeError("a defect")}


def _kill_a_worker_on_failure() -> None:
    """Make a loader worker die as soon as this rank handles its failure: torch's handler raises at any line."""
    original = launch.reset_sigchld_handler

    def died(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed")

    def reset() -> None:
        launch.reset_sigchld_handler = original
        os.kill(os.getpid(), signal.SIGCHLD)
        original()

    signal.signal(signal.SIGCHLD, died)
    launch.reset_sigchld_handler = reset


def _error_file(log: Path, rank: int) -> Path:
    return log.with_suffix(f".{rank}.error")


def _rank(rank: int, log: Path, who: str, what: str, how: str) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(TORCHELASTIC_RUN_ID=launch.RUN_ID, TORCHELASTIC_ERROR_FILE=str(_error_file(log, rank)))
    original, failed = launch.record_failure, 0.0

    def record(text: str, status: int) -> bool:
        nonlocal failed
        failed = time.monotonic()
        if how == f"stop{rank}":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif how.startswith(f"late{rank}="):
            time.sleep(float(how.partition("=")[2]))
        return original(text, status)

    launch.record_failure = record
    if how == f"worker{rank}":
        _kill_a_worker_on_failure()

    def job(config: PretrainConfig, run_dir: str) -> None:
        start_process(accelerator="cpu", seed=0, timeout_s=120)
        torch.distributed.barrier()
        if who in ("all", str(rank)):
            raise ERRORS[what]
        torch.distributed.barrier()

    sys.argv = ["pretrain_main.py", "modality=flow", f"hydra.run.dir={log.with_suffix('')}"]
    try:
        cli.run_entrypoint(job, PretrainConfig, config_name="config_pretrain")
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        log.with_suffix(f".{rank}").write_text(str(time.monotonic() - failed))
    return 0


def main(folder: Path, cases: list[str]) -> None:
    """Start all cases and wait for each. Suspended ranks are killed after the other ranks of their case have ended."""
    started = []
    for case in cases:
        name, who, what, how = case.split(":")
        log = folder / f"{name}.log"
        pids = fork_ranks(2, lambda rank, given=(log, who, what, how): _rank(rank, *given))
        started.append((log, pids, [how == f"stop{rank}" for rank in range(2)]))
    for log, pids, stopped in started:
        codes, failures = {}, {}
        for rank in sorted(range(2), key=lambda r: stopped[r]):
            if stopped[rank]:
                os.kill(pids[rank], signal.SIGKILL)
            codes[rank] = wait_for([pids[rank]])[0]
            failures[rank] = ProcessFailure(rank, pids[rank], codes[rank], str(_error_file(log, rank)))
            if stopped[rank]:
                failures[rank].timestamp += launch.KILL_TIMEOUT_S  # as the agent would do it
        seconds = [None if stopped[r] else float(log.with_suffix(f".{r}").read_text()) for r in range(2)]
        with contextlib.redirect_stderr(io.StringIO()) as text:
            status = launch.report_first_failure(failures)
        report = {"ends": [[codes[r], seconds[r]] for r in range(2)], "text": text.getvalue(), "status": status}
        log.with_suffix(".json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
