"""Runs the real entrypoints for tests: one interpreter imports everything, then forks the ranks of each run.

python -m tests.resume_worker PLAN.json     # {"runs": [{script, world, arguments, record, stop_at, ...}, ...]}

Each rank writes a line per step to ``RECORD.{rank}.jsonl``: epoch, clip numbers, the loss as hexadecimal. With
``stop_at`` = n, a rank of the run sends itself SIGTERM (or ``stop_signal``) in its n-th step; with ``nan_at`` = n, the
loss of the last rank's n-th batch is NaN. Exit codes go to PLAN.json.codes.
"""

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import mmdistill.distill.module as distill_module
import mmdistill.distill.run  # noqa: F401 - ahead of the forks
import mmdistill.launch as launch
import mmdistill.pretrain.loop as pretrain_loop

ROOT = Path(__file__).resolve().parents[1]


def _recorder(record: str, rank: int, stop: int | None, number: signal.Signals = signal.SIGTERM) -> Any:
    """A function that takes (epoch, clips, loss) and notes it."""
    done = 0

    def note(epoch: int, clips: list[int], loss: torch.Tensor) -> None:
        nonlocal done
        with open(f"{record}.{rank}.jsonl", "a") as file:
            file.write(json.dumps([epoch, clips, float(loss.detach()).hex()]) + "\n")
        done += 1
        if done == stop:
            os.kill(os.getpid(), number)

    return note


def _watch(note: Any) -> None:
    """Put `note` into both loops."""
    losses, step = pretrain_loop._Run.losses, distill_module.MMDistill.training_step

    def watched_losses(self: Any, batch: Any) -> Any:
        out = losses(self, batch)
        note(self.at.epoch, batch["index"].tolist(), out[0])
        return out

    def watched_step(self: Any, batch: Any, index: int) -> Any:
        out = step(self, batch, index)
        note(self.trainer.current_epoch, batch["index"].tolist(), out["loss"])
        return out

    pretrain_loop._Run.losses = watched_losses  # type: ignore[method-assign]
    distill_module.MMDistill.training_step = watched_step  # type: ignore[method-assign]


def _spoil(step: int) -> None:
    """Make this rank's loss of its `step`-th batch NaN, in both loops."""
    native, lightning = pretrain_loop._Run.losses, distill_module.MMDistill.losses
    done = 0

    def factor() -> float:
        nonlocal done
        done += 1
        return float("nan") if done == step else 1.0

    def native_losses(self: Any, batch: Any) -> Any:
        loss, trivial = native(self, batch)
        return loss * factor(), trivial

    def lightning_losses(self: Any, batch: Any) -> Any:
        out = lightning(self, batch)
        return {**out, "rgb": (out["rgb"][0] * factor(), out["rgb"][1])}

    pretrain_loop._Run.losses = native_losses  # type: ignore[method-assign]
    distill_module.MMDistill.losses = lightning_losses  # type: ignore[method-assign]


def _rank(run: dict[str, Any], rank: int, port: int) -> int:
    """One rank of one run; its exit code."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["world"], "LOCAL_WORLD_SIZE": run["world"],
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({k: str(v) for k, v in world.items()})
    launch._PARENT = os.getppid()  # this worker is the launcher
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined] # compiles a minute
    log = os.open(f"{run['record']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stop_at = run.get("stop_at") if rank == run.get("stop_rank", 0) else None
    _watch(_recorder(run["record"], rank, stop_at, signal.Signals[run.get("stop_signal", "SIGTERM")]))
    if rank == run["world"] - 1 and run.get("nan_at"):
        _spoil(run["nan_at"])
    sys.argv = [run["script"], *run["arguments"]]
    try:
        runpy.run_path(str(ROOT / run["script"]), run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _run(run: dict[str, Any]) -> list[int]:
    port = launch.free_port()
    pids = []
    for rank in range(run["world"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = _rank(run, rank, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(plan: Path) -> None:
    """All runs, one after another."""
    runs = json.loads(plan.read_text())["runs"]
    plan.with_name(plan.name + ".codes").write_text(json.dumps([_run(run) for run in runs]))


if __name__ == "__main__":
    os.chdir(ROOT)
    main(Path(sys.argv[1]))
