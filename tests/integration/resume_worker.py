"""Run trainings as the entrypoints do: one interpreter imports everything, then forks the ranks of each run.

The config of a run is composed once, before its ranks are forked. A sweep (``-m``) runs the entrypoint itself.

python -m tests.integration.resume_worker PLAN.json  # {"runs": [{script, world, arguments, record, stop_at, ...}, ...]}

Each rank writes a line per step to ``RECORD.{rank}.jsonl``: epoch, clip numbers, the loss as hexadecimal. Options:

- ``stop_at`` = n: a rank of the run sends itself SIGTERM (or ``stop_signal``) in its n-th step.
- ``nan_at`` = n: the loss of the last rank's n-th batch is NaN.
- ``inf_at`` = n (-1: every batch): that loss is finite, its gradient is not.
- ``record_states``, ``nan_at`` or ``inf_at``: write ``RECORD.{rank}.states.jsonl``, digests of weights, averages and
  moments before and after each batch.
- ``fp16``: allow precision=16 on a CPU.
- ``resume_newest``: the run folder whose newest checkpoint the run resumes from.
- ``uncached``: run the teachers in every epoch, on the masks of trainer.cache_teacher_epochs.

Exit codes go to PLAN.json.codes.
"""

import hashlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"

import torch

import mmdistill.distill.module as distill_module
import mmdistill.distill.trainer as distill_run
import mmdistill.pretrain.trainer as pretrain_loop
import mmdistill.training.train_data as train_data
from mmdistill.checkpoint import latest_valid_checkpoint
from mmdistill.cli.distill import run_distillation
from mmdistill.cli.entrypoint import exit_with_error
from mmdistill.cli.pretrain import run_pretraining
from tests.configs import distill_config, pretrain_config
from tests.ranks import fork_ranks, import_zero, wait_for

ROOT = Path(__file__).resolve().parents[2]
ENTRYPOINTS: dict[str, tuple[Callable[..., Any], Callable[..., None]]] = {  # how to make the config, job
    "pretrain_main.py": (pretrain_config, run_pretraining),
    "lit_main_mmdistill.py": (distill_config, run_distillation),
}


def _make_recorder(record: str, rank: int, stop: int | None, number: signal.Signals = signal.SIGTERM) -> Any:
    """A function that records (epoch, clips, loss)."""
    done = 0

    def record_step(epoch: int, clips: list[int], loss: torch.Tensor) -> None:
        nonlocal done
        with open(f"{record}.{rank}.jsonl", "a") as file:
            file.write(json.dumps([epoch, clips, float(loss.detach()).hex()]) + "\n")
        done += 1
        if done == stop:
            os.kill(os.getpid(), number)

    return record_step


def _record_steps(record_step: Any) -> None:
    """Call `record_step` in both trainings."""
    losses, step = pretrain_loop.PretrainTrainer.losses, distill_module.MMDistill.training_step

    def recorded_losses(self: Any, batch: Any) -> Any:
        out = losses(self, batch)
        record_step(self.state.epoch, batch["index"].tolist(), out[0])
        return out

    def recorded_step(self: Any, batch: Any, index: int) -> Any:
        out = step(self, batch, index)
        record_step(self.trainer.current_epoch, batch["index"].tolist(), out["loss"])
        return out

    pretrain_loop.PretrainTrainer.losses = recorded_losses  # type: ignore[method-assign]
    distill_module.MMDistill.training_step = recorded_step  # type: ignore[method-assign]


def _make_nonfinite(step: int, *, loss: bool) -> None:
    """Make this rank's loss of its `step`-th batch NaN, or only its gradient infinite, in both trainings."""
    native, lightning = pretrain_loop.PretrainTrainer.losses, distill_module.MMDistill.losses
    done = 0

    def make_nonfinite(value: torch.Tensor) -> torch.Tensor:
        nonlocal done
        done += 1
        if step not in (done, -1):
            return value
        value = value * (float("nan") if loss else 1.0)
        if not loss:
            value.register_hook(lambda gradient: gradient * float("inf"))
        return value

    def native_losses(self: Any, batch: Any) -> Any:
        loss, baseline = native(self, batch)
        return make_nonfinite(loss), baseline

    def lightning_losses(self: Any, batch: Any) -> Any:
        out = lightning(self, batch)
        return {**out, "rgb": (make_nonfinite(out["rgb"][0]), out["rgb"][1])}

    pretrain_loop.PretrainTrainer.losses = native_losses  # type: ignore[method-assign]
    distill_module.MMDistill.losses = lightning_losses  # type: ignore[method-assign]


def _digest(module: torch.nn.Module, optimizer: Any) -> str:
    """Digest of all weights, of the optimizer's own copy of them, and of its state."""
    inner = getattr(optimizer, "optimizer", optimizer)
    own = [p for group in inner.param_groups for p in group["params"]]
    state = [v for p in own for v in inner.state.get(p, {}).values()]
    sha = hashlib.sha256()
    for tensor in [*module.state_dict().values(), *own, *state]:
        sha.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _record_states(path: str) -> None:
    """Write a line per batch: digest before, digest after."""
    native, lightning = pretrain_loop.PretrainTrainer.train_step, distill_module.MMDistill.training_step
    before = ""

    def write_digests(now: str) -> None:
        with open(path, "a") as file:
            file.write(json.dumps([before, now]) + "\n")

    def native_step(self: Any, batch: Any) -> Any:
        nonlocal before
        before = _digest(self.engine.module, self.engine.optimizer)
        out = native(self, batch)
        write_digests(_digest(self.engine.module, self.engine.optimizer))
        return out

    def begin(self: Any, batch: Any, index: int) -> Any:
        nonlocal before
        before = _digest(self, self.trainer.strategy.optimizers[0])
        return lightning(self, batch, index)

    def end(self: Any, outputs: Any, batch: Any, index: int) -> None:
        write_digests(_digest(self, self.trainer.strategy.optimizers[0]))

    pretrain_loop.PretrainTrainer.train_step = native_step  # type: ignore[method-assign]
    distill_module.MMDistill.training_step = begin  # type: ignore[method-assign]
    distill_module.MMDistill.on_train_batch_end = end  # type: ignore[method-assign]


def _allow_fp16() -> None:
    """Allow fp16 on a CPU: slow, but it tests how DeepSpeed and Lightning handle the loss scale."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from pytorch_lightning.plugins.precision import MixedPrecision

    import mmdistill.distributed.device as device_module

    device_module.has_fp16 = lambda device: True
    CPU_Accelerator.is_fp16_supported = lambda self: True  # type: ignore[method-assign]
    make_kwargs = distill_run.strategy_kwargs

    def with_plugin(*args: Any, **kwargs: Any) -> dict[str, Any]:
        out = make_kwargs(*args, **kwargs)
        assert out.pop("precision") == "16-mixed"
        return {**out, "plugins": [*out["plugins"], MixedPrecision("16-mixed", "cpu")]}

    distill_run.strategy_kwargs = with_plugin


def _disable_cache() -> None:
    """Read all modalities and run the teachers in every epoch."""
    distill_run.TeacherCache.is_cached = lambda self, epoch: False  # type: ignore[method-assign]
    make = train_data.make_clip_dataset

    def make_uncached(*args: Any, **kwargs: Any) -> Any:
        dataset = make(*args, **kwargs)
        assert hasattr(dataset, "always_decoded")
        dataset.always_decoded = tuple(dataset.readers)
        return dataset

    train_data.make_clip_dataset = make_uncached


def _entrypoint(run: dict[str, Any]) -> Callable[[], None]:
    """The training of a run, which exits like the entrypoint of ``run["script"]``."""
    arguments = run["arguments"]
    if "resume_newest" in run:
        arguments.append(f"resume={latest_valid_checkpoint(Path(run['resume_newest']) / 'checkpoints')}")
    if "-m" in arguments:
        sys.argv = [run["script"], *arguments]
        return lambda: runpy.run_path(str(ROOT / run["script"]), run_name="__main__") and None
    make_config, job = ENTRYPOINTS[run["script"]]
    no_teachers = ["trainer.ckpt_path=null"] if make_config is distill_config else []  # unless `arguments` name some
    config = make_config(*no_teachers, *(a for a in arguments if not a.startswith("hydra.")))
    (run_dir,) = (a.removeprefix("hydra.run.dir=") for a in arguments if a.startswith("hydra.run.dir="))

    def call() -> None:
        try:
            job(config, run_dir)
        except Exception as error:
            exit_with_error(error, type(config))

    return call


def _rank(run: dict[str, Any], entrypoint: Callable[[], None], rank: int) -> int:
    """One rank of one run; its exit code."""
    log = os.open(f"{run['record']}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stop_at = run.get("stop_at") if rank == run.get("stop_rank", 0) else None
    _record_steps(_make_recorder(run["record"], rank, stop_at, signal.Signals[run.get("stop_signal", "SIGTERM")]))
    nonfinite_at = run.get("nan_at") or run.get("inf_at")
    if nonfinite_at and rank == run["world"] - 1:
        _make_nonfinite(nonfinite_at, loss="nan_at" in run)
    if nonfinite_at or run.get("record_states"):
        _record_states(f"{run['record']}.{rank}.states.jsonl")
    if run.get("fp16"):
        _allow_fp16()
    if run.get("uncached"):
        _disable_cache()
    try:
        entrypoint()
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


def _run(run: dict[str, Any]) -> list[int]:
    entrypoint = _entrypoint(run)
    return wait_for(fork_ranks(run["world"], lambda rank: _rank(run, entrypoint, rank)))


def main(plan: Path) -> None:
    """All runs, one after another."""
    import_zero()
    runs = json.loads(plan.read_text())["runs"]
    plan.with_name(plan.name + ".codes").write_text(json.dumps([_run(run) for run in runs]))


if __name__ == "__main__":
    os.chdir(ROOT)
    main(Path(sys.argv[1]))
