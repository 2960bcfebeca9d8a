"""Distillations under each strategy for test_strategy.py: one interpreter imports everything, then forks their ranks.

python -m tests.distill.strategy_worker FOLDER     # writes one folder per run, and FOLDER/results.json
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from pytorch_lightning.strategies import DeepSpeedStrategy

from mmdistill import launch
from mmdistill.checkpoint import CheckpointError
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.config import DistillConfig, modality_specs, parse, register_schemas, to_plain
from mmdistill.distill import callbacks, run
from mmdistill.distill import strategy as strategies
from mmdistill.distill.module import MMDistill
from mmdistill.models.cmt import CrossModalTransfer
from mmdistill.models.videomae import DecoderGeometry, EncoderGeometry, VideoMAE
from tests.tiny_data import make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["trainer.epochs=2", "trainer.save_ckpt_freq=1", "batch_size=4", "test=False", "trainer.lr=1.0"]
CLIPPED = ["trainer.clip_grad=0.01", "trainer.accumulate=4"]  # 6 batches: the second step of an epoch has only 2


def start(world: int, job: Callable[..., None], *args: object) -> list[int]:
    """Fork `world` ranks; exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            os.environ.update({k: str(v) for k, v in place.items()})
            launch._PARENT = os.getppid()  # a rank's launcher is the process that forked it
            code = 1
            try:
                torch.set_num_threads(1)
                job(rank, *args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]


def config_of(folder: Path, *more: str) -> DistillConfig:
    register_schemas()
    teachers = ",".join(f"{m}:{folder / m}" for m in ("rgb", "flow", "skeleton"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose(
            "config_mmdistill",
            [f"trainer.ckpt_path={{{teachers}}}", *overrides(folder / "data"), *COMMON, *more],
        )
    return parse(cfg, DistillConfig)


def small_parameter() -> None:
    """Give the transfer head a parameter of one element."""
    made, forward = CrossModalTransfer.__init__, CrossModalTransfer.forward

    def init(self: CrossModalTransfer, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)
        self.gain = torch.nn.Parameter(torch.ones(1))

    CrossModalTransfer.__init__ = init
    CrossModalTransfer.forward = lambda self, x: {m: v * self.gain for m, v in forward(self, x).items()}


def watch(place: Path) -> None:
    """Write what the strategy holds when training begins, and the losses of all batches."""
    losses: list[str] = []

    def begin(module: MMDistill) -> None:
        strategy = module.trainer.strategy
        told = {"state_dict": strategy.lightning_module_state_dict(),
                "optimizer": strategy.optimizer_state(strategy.optimizers[0])}  # fmt: skip
        if strategy.is_global_zero:
            place.mkdir(parents=True, exist_ok=True)
            torch.save(told, place / "begin.pt")

    def step(module: MMDistill, outputs: dict, batch: object, index: int) -> None:
        losses.append(float(outputs["loss"]).hex())

    def end(module: MMDistill) -> None:
        if module.trainer.is_global_zero:
            (place / "losses.json").write_text(json.dumps(losses))

    MMDistill.on_train_start, MMDistill.on_train_batch_end, MMDistill.on_train_end = begin, step, end


def train(rank: int, folder: Path, name: str, *more: str) -> None:
    """One distillation; ranks other than 0 do not know the run's folder."""
    watch(folder / name)
    run.distill(config_of(folder, *more), folder / name if rank == 0 else folder / f"elsewhere{rank}")


def first_epoch(folder: Path, name: str) -> str:
    return str(next((folder / name / "checkpoints").glob("epoch=00-*")))


def stock_directory(rank: int, folder: Path, name: str) -> None:
    """At the first epoch's end, what Lightning's own DeepSpeed strategy writes."""
    saved = callbacks.EpochCheckpoints.on_train_epoch_end

    def both(self: object, trainer: object, module: object) -> None:
        saved(self, trainer, module)
        if trainer.current_epoch == 0:
            content = trainer._checkpoint_connector.dump_checkpoint(False)
            DeepSpeedStrategy.save_checkpoint(trainer.strategy, content, folder / name / "stock.ckpt")

    callbacks.EpochCheckpoints.on_train_epoch_end = both
    train(rank, folder, name, "strategy=deepspeed_stage_1")


def full_disk(rank: int, folder: Path, name: str, strategy: str) -> None:
    """Rank 0 cannot write its file: what each rank is told, and how soon."""
    began = 0.0
    save = strategies._OneFile.save_checkpoint

    def timed(self: object, *args: object, **kwargs: object) -> None:
        nonlocal began
        began = time.perf_counter()
        save(self, *args, **kwargs)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    strategies._OneFile.save_checkpoint = timed
    callbacks.save_torch = fail
    told = None
    try:
        train(rank, folder, name, f"strategy={strategy}", "trainer.epochs=1")
    except CheckpointError as error:
        told = str(error)
    seconds = time.perf_counter() - began
    left = sorted(p.name for p in (folder / name / "checkpoints").glob("*")) if rank == 0 else []
    (folder / f"{name}.{rank}.json").write_text(json.dumps({"told": told, "seconds": seconds, "left": left}))


def make_teachers(folder: Path) -> None:
    specs = modality_specs(config_of(folder).data_module)
    for number, (modality, spec) in enumerate(specs.items()):
        torch.manual_seed(number)
        size = 32 // spec.scale
        geometry = EncoderGeometry(spec.channels, 4, size, size, 8 // spec.scale, 2, 16, 1, 2, 8, 32)
        model = VideoMAE(geometry, DecoderGeometry(8, 1, 1, 8, 16))
        meta = {"kind": "pretrain", "modality": modality, "encoders": {"encoder": to_plain(geometry)}}
        write_deepspeed(model.state_dict(), folder / modality, meta)


KINDS = {"auto-1": ("auto", 1), "ddp-2": ("ddp", 2), "zero0-1": ("deepspeed_stage_0", 1),
         "zero1-1": ("deepspeed_stage_1", 1), "zero2-1": ("deepspeed", 1),
         "zero2-2": ("deepspeed_stage_2", 2)}  # fmt: skip
CROSS = [("zero2-2", "zero0-1"), ("zero2-2", "auto-1"), ("auto-1", "zero2-2"), ("zero0-1", "zero1-1")]


def main(folder: Path) -> None:
    """All runs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401 - once for all, before the forks

    small_parameter()
    make_tiny(folder / "data", per_class=2)
    make_teachers(folder)
    codes: dict[str, list[int]] = {}

    def go(name: str, world: int, *more: str) -> None:
        codes[name] = start(world, train, folder, name, *more)

    for kind, (strategy, world) in KINDS.items():
        chosen = (f"strategy={strategy}",)
        go(f"{kind}", world, *chosen)
        go(f"{kind}-resumed", world, *chosen, f"resume='{first_epoch(folder, kind)}'")
    for source, target in CROSS:
        strategy, world = KINDS[target]
        resume = f"resume='{first_epoch(folder, source)}'"
        go(f"{source}-to-{target}", world, f"strategy={strategy}", resume)
    for kind in ("auto-1", "zero0-1", "zero2-1"):
        chosen = f"strategy={KINDS[kind][0]}", *CLIPPED
        go(f"{kind}-clipped", 1, *chosen)
    go("zero2-1-clipped-resumed", 1, "strategy=deepspeed", *CLIPPED,
       f"resume='{first_epoch(folder, 'zero2-1-clipped')}'")  # fmt: skip
    go("bf16", 1, "strategy=deepspeed", "precision=bf16")
    go("bf16-resumed", 1, "strategy=deepspeed", "precision=bf16", f"resume='{first_epoch(folder, 'bf16')}'")
    go("bf16-auto", 1, "strategy=auto", "precision=bf16")
    codes["stock"] = start(1, stock_directory, folder, "stock")
    go("stock-resumed", 1, "strategy=deepspeed_stage_1", f"resume='{folder / 'stock' / 'stock.ckpt'}'")
    for strategy in ("ddp", "deepspeed"):
        codes[f"full-{strategy}"] = start(2, full_disk, folder, f"full-{strategy}", strategy)
    (folder / "results.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
