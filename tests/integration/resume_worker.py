"""Runs the real entrypoints for tests: one interpreter imports everything, then forks the ranks of each run.

python -m tests.integration.resume_worker PLAN.json  # {"runs": [{script, world, arguments, record, stop_at, ...}, ...]}

Each rank writes a line per step to ``RECORD.{rank}.jsonl``: epoch, clip numbers, the loss as hexadecimal. With
``stop_at`` = n, a rank of the run sends itself SIGTERM (or ``stop_signal``) in its n-th step; with ``nan_at`` = n, the
loss of the last rank's n-th batch is NaN; with ``inf_at`` = n (or -1: of every one), that loss is finite and its
gradient is not. Either of them, or ``watch``, writes ``RECORD.{rank}.states.jsonl``: digests of weights, averages and
moments before and after each batch. With ``fp16`` precision=16 is let through on a CPU; with ``uncached`` teachers run
on the masks of trainer.cache_teacher_epochs in every epoch. Exit codes go to PLAN.json.codes.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import mmdistill.distill.module as distill_module
import mmdistill.distill.trainer as distill_run
import mmdistill.pretrain.trainer as pretrain_loop
from tests.ranks import fork_ranks, import_zero, wait_for

ROOT = Path(__file__).resolve().parents[2]


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


def _spoil(step: int, *, loss: bool) -> None:
    """Make this rank's loss of its `step`-th batch NaN, or only its gradient infinite, in both loops."""
    native, lightning = pretrain_loop._Run.losses, distill_module.MMDistill.losses
    done = 0

    def spoiled(value: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        if step not in (done, -1):
            return value
        value = value * (float("nan") if loss else 1.0)
        if not loss:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    def native_losses(self: Any, batch: Any) -> Any:
        loss, trivial = native(self, batch)
        return spoiled(loss), trivial

    def lightning_losses(self: Any, batch: Any) -> Any:
        out = lightning(self, batch)
        return {**out, "rgb": (spoiled(out["rgb"][0]), out["rgb"][1])}

    pretrain_loop._Run.losses = native_losses  # type: ignore[method-assign]
    distill_module.MMDistill.losses = lightning_losses  # type: ignore[method-assign]


def _digest(module: torch.nn.Module, optimizer: Any) -> str:
    """Of all weights, of the optimiser's own copy of them, and of its state."""
    inner = getattr(optimizer, "optimizer", optimizer)
    own = [p for group in inner.param_groups for p in group["params"]]
    state = [v for p in own for v in inner.state.get(p, {}).values()]
    sha = hashlib.sha256()
    for tensor in [*module.state_dict().values(), *own, *state]:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _watch_states(path: str) -> None:
    """Write a line per batch: digest before, digest after."""
    native, lightning = pretrain_loop._train_step, distill_module.MMDistill.training_step
    before = ""

    def note(now: str) -> None:
        with open(path, "a") as file:
            file.write(json.dumps([before, now]) + "\n")

    def native_step(run: Any, batch: Any) -> Any:
        nonlocal before
        before = _digest(run.engine.module, run.engine.optimizer)
        out = native(run, batch)
        note(_digest(run.engine.module, run.engine.optimizer))
        return out

    def begin(self: Any, batch: Any, index: int) -> Any:
        nonlocal before
        before = _digest(self, self.trainer.strategy.optimizers[0])
        return lightning(self, batch, index)

    def end(self: Any, outputs: Any, batch: Any, index: int) -> None:
        note(_digest(self, self.trainer.strategy.optimizers[0]))

    pretrain_loop._train_step = native_step
    distill_module.MMDistill.training_step = begin  # type: ignore[method-assign]
    distill_module.MMDistill.on_train_batch_end = end  # type: ignore[method-assign]


def _allow_fp16() -> None:
    """Slow on a CPU, but it computes: what DeepSpeed and Lightning do about the loss scale can be seen."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from pytorch_lightning.plugins.precision import MixedPrecision

    import mmdistill.distributed.process as runtime

    runtime.has_fp16 = lambda device: True
    CPU_Accelerator.is_fp16_supported = lambda self: True  # type: ignore[method-assign]
    place = distill_run.strategy_kwargs

    def with_plugin(*args: Any, **kwargs: Any) -> dict[str, Any]:
        out = place(*args, **kwargs)
        assert out.pop("precision") == "16-mixed"
        return {**out, "plugins": [*out["plugins"], MixedPrecision("16-mixed", "cpu")]}

    distill_run.strategy_kwargs = with_plugin


def _never_cached() -> None:
    """All modalities are read, and teachers run, in every epoch."""
    distill_run.TeacherCache.serves = lambda self, epoch: False  # type: ignore[method-assign]
    make = distill_run.make_clip_dataset

    def whole(*args: Any, **kwargs: Any) -> Any:
        dataset = make(*args, **kwargs)
        dataset.lasting = tuple(dataset.readers)
        return dataset

    distill_run.make_clip_dataset = whole


def _rank(run: dict[str, Any], rank: int) -> int:
    """One rank of one run; its exit code."""
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined] # compiles a minute
    log = os.open(f"{run['record']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stop_at = run.get("stop_at") if rank == run.get("stop_rank", 0) else None
    _watch(_recorder(run["record"], rank, stop_at, signal.Signals[run.get("stop_signal", "SIGTERM")]))
    spoiled = run.get("nan_at") or run.get("inf_at")
    if spoiled and rank == run["world"] - 1:
        _spoil(spoiled, loss="nan_at" in run)
    if spoiled or run.get("watch"):
        _watch_states(f"{run['record']}.{rank}.states.jsonl")
    if run.get("fp16"):
        _allow_fp16()
    if run.get("uncached"):
        _never_cached()
    sys.argv = [run["script"], *run["arguments"]]
    try:
        runpy.run_path(str(ROOT / run["script"]), run_name="__main__")
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def _run(run: dict[str, Any]) -> list[int]:
    return wait_for(fork_ranks(run["world"], lambda rank: _rank(run, rank)))


def main(plan: Path) -> None:
    """All runs, one after another."""
    import_zero()
    runs = json.loads(plan.read_text())["runs"]
    plan.with_name(plan.name + ".codes").write_text(json.dumps([_run(run) for run in runs]))


if __name__ == "__main__":
    os.chdir(ROOT)
    main(Path(sys.argv[1]))
