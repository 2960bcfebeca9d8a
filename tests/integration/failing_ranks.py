"""Two ranks of an entrypoint whose job fails: python -m tests.integration.failing_ranks FOLDER CASE...

A CASE is ``NAME:WHO:WHAT:HOW``: rank WHO (or ``all``) raises WHAT (``nan``: as every rank does; ``defect``), the others
wait for it in a collective. HOW is what a rank does before it asks who was first: ``late1=S`` is rank 1's sleep of S
seconds, ``stop0`` and ``stop1`` suspend that rank; with ``worker1`` a loader worker of rank 1 has died too when that
rank looks at its failure; ``bound=S`` is how long ranks wait for each other. Several are joined by commas. All cases
run at once.

FOLDER/NAME.log takes what the ranks print, FOLDER/NAME.json for each rank its exit code and the seconds from its
failure to its end (None for one that was suspended).
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
            launch._ASK_SECONDS = float(part.partition("=")[2])
        elif part == f"stop{rank}":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif part.startswith(f"late{rank}="):
            time.sleep(float(part.partition("=")[2]))


def _let_a_worker_die() -> None:
    """As torch sees it: its handler raises wherever the process is, here at the first thing done about a failure."""
    leave = launch.reset_sigchld_handler

    def died(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed")

    def leaving() -> None:
        launch.reset_sigchld_handler = leave
        os.kill(os.getpid(), signal.SIGCHLD)
        leave()

    signal.signal(signal.SIGCHLD, died)
    launch.reset_sigchld_handler = leaving


def _rank(rank: int, log: Path, who: str, what: str, how: list[str]) -> int:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    ask, failed = launch.claim_first_failure, 0.0

    def asking(job: int) -> int | None:
        nonlocal failed
        failed = time.monotonic()
        _prepare(rank, how)
        return ask(job)

    launch.claim_first_failure = asking
    if f"worker{rank}" in how:
        _let_a_worker_die()

    def job(config: PretrainConfig, run_dir: str) -> None:
        start_process(accelerator="cpu", seed=0, timeout_s=120)
        torch.distributed.barrier()
        if who in ("all", str(rank)):
            raise NonFiniteError("loss is nan") if what == "nan" else TypeError("a defect")
        torch.distributed.barrier()

    sys.argv = ["pretrain_main.py", "modality=flow", f"hydra.run.dir={log.with_suffix('')}"]
    try:
        cli.run_entrypoint(job, PretrainConfig, config_name="config_pretrain")
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        log.with_suffix(f".{rank}").write_text(str(time.monotonic() - failed))
    return 0


def main(folder: Path, cases: list[str]) -> None:
    """Start all cases, then wait for each; the suspended ranks of a case are killed when the others have ended."""
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
