"""Distillations under each strategy for test_strategy.py: one interpreter imports everything, then forks their ranks.

python -m tests.integration.strategy_worker FOLDER     # writes one folder per run, and FOLDER/results.json
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning.strategies import DeepSpeedStrategy

from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.write import DirectFile
from mmdistill.config import DistillConfig, modality_specs, to_plain
from mmdistill.distill import callbacks
from mmdistill.distill import strategy as strategies
from mmdistill.distill import trainer as run
from mmdistill.distill.module import MMDistill
from mmdistill.models.transfer_head import CrossModalTransfer
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE
from tests.configs import distill_config
from tests.ranks import fork_ranks, import_zero, wait_for
from tests.tiny_data import make_tiny, overrides

COMMON = ["trainer.epochs=2", "trainer.save_ckpt_freq=1", "batch_size=4", "test=False", "trainer.lr=1.0"]
CLIPPED = [
    "trainer.clip_grad=0.01",
    "trainer.accumulate_grad_batches=4",
]  # 6 batches: the second step of an epoch has only 2


def start(world: int, job: Callable[..., int | None], *args: object) -> list[int]:
    """Fork `world` ranks; exit codes."""

    def one_thread(rank: int) -> int | None:
        torch.set_num_threads(1)
        return job(rank, *args)

    return wait_for(fork_ranks(world, one_thread))


def config_of(folder: Path, *more: str) -> DistillConfig:
    teachers = ",".join(str(folder / m) for m in ("rgb", "flow", "skeleton"))
    given = [f"trainer.ckpt_path=[{teachers}]", *overrides(folder / "data"), *COMMON, *more]
    return distill_config(*given)


def small_parameter() -> None:
    """Give the transfer head a parameter of one element."""
    made, forward = CrossModalTransfer.__init__, CrossModalTransfer.forward

    def init(self: CrossModalTransfer, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)
        self.gain = torch.nn.Parameter(torch.ones(1))

    CrossModalTransfer.__init__ = init
    CrossModalTransfer.forward = lambda self, x: {m: v * self.gain for m, v in forward(self, x).items()}


def record(folder: Path, stop: int | None) -> None:
    """Write the strategy's state at the start, and the loss of each batch; send SIGTERM in the `stop`-th batch."""
    losses: list[str] = []
    training_step = MMDistill.training_step

    def begin(module: MMDistill) -> None:
        strategy = module.trainer.strategy
        state = {"state_dict": strategy.lightning_module_state_dict(),
                 "optimizer": strategy.optimizer_state(strategy.optimizers[0])}  # fmt: skip
        if strategy.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / "begin.pt")

    def step(module: MMDistill, batch: dict, index: int) -> dict:
        outputs: dict = training_step(module, batch, index)
        losses.append(float(outputs["loss"]).hex())
        if module.trainer.is_global_zero:
            (folder / "losses.json").write_text(json.dumps(losses))
        if len(losses) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs

    MMDistill.on_train_start, MMDistill.training_step = begin, step


def train(rank: int, folder: Path, name: str, *more: str, stop: int | None = None) -> int:
    """One distillation; only rank 0 gets the run's folder."""
    record(folder / name, stop)
    try:
        run.distill(config_of(folder, *more), folder / name if rank == 0 else folder / f"elsewhere{rank}")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def first_epoch(folder: Path, name: str) -> str:
    return str(next((folder / name / "checkpoints").glob("epoch=00-*")))


def stopped(folder: Path, name: str) -> str:
    return str(folder / f"{name}-stopped" / "checkpoints" / "last.ckpt")


def stock_directory(rank: int, folder: Path, name: str) -> None:
    """At the end of the first epoch, also write the directory of Lightning's own DeepSpeed strategy."""
    saved = callbacks.EpochCheckpoints.on_train_epoch_end

    def save_both(self: object, trainer: object, module: object) -> None:
        saved(self, trainer, module)
        if trainer.current_epoch == 0:
            content = trainer._checkpoint_connector.dump_checkpoint(False)
            DeepSpeedStrategy.save_checkpoint(trainer.strategy, content, folder / name / "stock.ckpt")

    callbacks.EpochCheckpoints.on_train_epoch_end = save_both
    train(rank, folder, name, "strategy=deepspeed_stage_1")


def full_disk(rank: int, folder: Path, name: str, strategy: str) -> None:
    """Rank 0 cannot write its file: record each rank's error message, and after how many seconds it is raised."""
    began = 0.0
    save = strategies.SingleFileCheckpointMixin.save_checkpoint

    def timed(self: object, *args: object, **kwargs: object) -> None:
        nonlocal began
        began = time.perf_counter()
        save(self, *args, **kwargs)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    strategies.SingleFileCheckpointMixin.save_checkpoint = timed
    DirectFile.write = fail  # type: ignore[method-assign]
    message = None
    try:
        train(rank, folder, name, f"strategy={strategy}", "trainer.epochs=1")
    except CheckpointError as error:
        message = str(error)
    seconds = time.perf_counter() - began
    files = sorted(p.name for p in (folder / name / "checkpoints").glob("*")) if rank == 0 else []
    (folder / f"{name}.{rank}.json").write_text(json.dumps({"message": message, "seconds": seconds, "files": files}))


def make_teachers(folder: Path) -> None:
    specs = modality_specs(config_of(folder).data_module)
    for number, (modality, spec) in enumerate(specs.items()):
        torch.manual_seed(number)
        size = 32 // spec.input_stride
        geometry = EncoderConfig(spec.channels, 4, size, size, 8 // spec.input_stride, 2, 16, 1, 2, 8, 32)
        model = VideoMAE(geometry, DecoderConfig(8, 1, 1, 8, 16))
        meta = {"kind": "pretrain", "modality": modality, "encoders": {"encoder": to_plain(geometry)}}
        write_deepspeed(model.state_dict(), folder / modality, meta)


KINDS = {"auto-1": ("auto", 1), "ddp-2": ("ddp", 2), "zero0-1": ("deepspeed_stage_0", 1),
         "zero1-1": ("deepspeed_stage_1_offload", 1), "zero2-1": ("deepspeed", 1), "zero0-2": ("deepspeed_stage_0", 2),
         "zero1-2": ("deepspeed_stage_1", 2), "zero2-2": ("deepspeed_stage_2", 2)}  # fmt: skip
RESUMED = [kind for kind in KINDS if kind.startswith("zero")]  # test_resume.py covers the others
CROSS = [("zero2-2", "zero0-1"), ("zero2-2", "auto-1"), ("auto-1", "zero2-2")]
INSIDE = [("zero2-2", "auto-1"), ("zero0-1", "zero1-2")]  # the same, from the middle of an epoch


def main(folder: Path) -> None:
    """All runs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import_zero()

    small_parameter()
    make_tiny(folder / "data", per_class=2)
    make_teachers(folder)
    codes: dict[str, list[int]] = {}

    def run_once(name: str, world: int, *more: str, stop: int | None = None) -> None:
        codes[name] = start(world, partial(train, stop=stop), folder, name, *more)

    def run_in_parts(name: str, world: int, *more: str) -> None:
        """Uninterrupted; from the end of the first epoch into the second one; from there to the end."""
        run_once(name, world, *more)
        run_once(f"{name}-stopped", world, *more, f"resume='{first_epoch(folder, name)}'", stop=2)
        run_once(f"{name}-resumed", world, *more, f"resume='{stopped(folder, name)}'")

    for kind, (strategy, world) in KINDS.items():
        (run_in_parts if kind in RESUMED else run_once)(kind, world, f"strategy={strategy}")
    for source, target in CROSS:
        strategy, world = KINDS[target]
        resume = f"resume='{first_epoch(folder, source)}'"
        run_once(f"{source}-to-{target}", world, f"strategy={strategy}", resume)
    for source, target in INSIDE:
        (strategy, world), batch = KINDS[target], 4 * KINDS[source][1] // KINDS[target][1]
        chosen = f"strategy={strategy}", f"batch_size={batch}"
        run_once(f"{source}-inside-{target}", world, *chosen, f"resume='{stopped(folder, source)}'")
    for kind in ("auto-1", "zero0-1"):
        run_once(f"{kind}-clipped", 1, f"strategy={KINDS[kind][0]}", *CLIPPED)
    run_in_parts("zero2-1-clipped", 1, "strategy=deepspeed", *CLIPPED)
    run_in_parts("bf16", 1, "strategy=deepspeed", "precision=bf16")
    run_once("bf16-auto", 1, "strategy=auto", "precision=bf16")
    codes["stock"] = start(1, stock_directory, folder, "stock")
    run_once("stock-resumed", 1, "strategy=deepspeed_stage_1", f"resume='{folder / 'stock' / 'stock.ckpt'}'")
    for strategy in ("ddp", "deepspeed"):
        codes[f"full-{strategy}"] = start(2, full_disk, folder, f"full-{strategy}", strategy)
    (folder / "results.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
