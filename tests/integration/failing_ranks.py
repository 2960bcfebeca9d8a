"""Two ranks of an entrypoint whose job fails: python -m tests.integration.failing_ranks FOLDER CASE...

A CASE is ``NAME:WHO:WHAT:HOW``. Rank WHO (or ``all``) raises WHAT (``nan``: an error that every rank raises;
``defect``: an unexpected one); the other ranks wait for it in a collective. HOW lists, separated by commas, what a rank
does before it asks which rank failed first: ``late1=S``: rank 1 sleeps S seconds; ``stop0`` and ``stop1``: that rank is
suspended; ``worker1``: a loader worker of rank 1 dies at the same time; ``bound=S``: time limit of the store. All cases
run at the same time.

FOLDER/NAME.log is the output of the ranks. FOLDER/NAME.json has for each rank its exit code and the seconds from its
failure to its end (None for a suspended rank).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from mmdistill.cli import entrypoint as cli
from mmdistill.config import PretrainConfig
from mmdistill.distributed import launch
from mmdistill.distributed.process import start_process
from mmdistill.training.nonfinite import NonFiniteError
from tests.ranks import fork_ranks, wait_for


def _prepare(rank: int, how: list[str]) -> None:
    for part in how:
        if part.startswith("bound="):
            launch.STORE_TIMEOUT_S = float(part.partition("=")[2])
        elif part == f"stop{rank}":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif part.startswith(f"late{rank}="):
            time.sleep(float(part.partition("=")[2]))


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


def _rank(rank: int, log: Path, who: str, what: str, how: list[str]) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    original, failed = launch.claim_first_failure, 0.0

    def claim(job: int) -> int | None:
        nonlocal failed
        failed = time.monotonic()
        _prepare(rank, how)
        return original(job)

    launch.claim_first_failure = claim
    if f"worker{rank}" in how:
        _kill_a_worker_on_failure()

    def job(config: PretrainConfig, run_dir: str) -> None:
        start_process(accelerator="cpu", seed=0, timeout_s=120)
        torch.distributed.barrier()
        if who in ("all", str(rank)):
            raise NonFiniteError("loss is nan") if what == "nan" else TypeError("a defect")
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
        log, parts = folder / f"{name}.log", how.split(",")
        pids = fork_ranks(2, lambda rank, given=(log, who, what, parts): _rank(rank, *given))
        started.append((log, pids, [f"stop{rank}" in parts for rank in range(2)]))
    for log, pids, stopped in started:
        codes = {}
        for rank in sorted(range(2), key=lambda r: stopped[r]):
            if stopped[rank]:
                os.kill(pids[rank], signal.SIGKILL)
            codes[rank] = wait_for([pids[rank]])[0]
        seconds = [None if stopped[r] else float(log.with_suffix(f".{r}").read_text()) for r in range(2)]
        log.with_suffix(".json").write_text(json.dumps([[codes[r], seconds[r]] for r in range(2)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
