"""Runs DeepSpeed engines for test_deepspeed_engine.py: one interpreter imports all and forks the ranks of a scenario.

python -m tests.integration.deepspeed_engine_worker FOLDER     # writes FOLDER/results.json
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import torch

from mmdistill.checkpoint import (
    CheckpointError,
    deepspeed_engine,
    latest_valid_checkpoint,
    load_deepspeed,
    read_checkpoint,
    save_deepspeed,
)
from mmdistill.checkpoint.formats import manifest
from mmdistill.checkpoint.formats.deepspeed_zero import adam_step
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.distributed.process import disable_shm_op
from tests.ranks import fork_ranks, import_zero, wait_for
from tests.unit.checkpoint.make_fixtures import cast_key_bias, engine_for, model, train

KINDS = [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True), (3, False), (3, True)]
META = {"kind": "pretrain", "epoch": 1, "loss": 0.5, "modality": "rgb"}


def launch(
    world: int, scenario: Callable[..., None], *args: object, kill: tuple[int, Callable[[], None]] | None = None
) -> list[int]:
    """Fork `world` ranks and return exit codes. `kill` = (rank, wait) kills that rank after `wait`, then the others."""

    def job(rank: int) -> None:
        disable_shm_op()
        deepspeed.init_distributed("gloo")
        scenario(rank, *args)
        torch.distributed.barrier()

    ranks = fork_ranks(world, job)
    if kill:
        kill[1]()
        os.kill(ranks[kill[0]], signal.SIGKILL)
        os.waitpid(ranks[kill[0]], 0)
        time.sleep(0.05)
        rest = [pid for i, pid in enumerate(ranks) if i != kill[0]]
        for pid in rest:
            os.kill(pid, signal.SIGKILL)
        return [-9, *wait_for(rest)]
    return wait_for(ranks)


def make_engine(stage: int, bf16: bool):
    net = model()
    if bf16:
        cast_key_bias(net)
    return engine_for(net, stage, bf16)


def run_action(action: Callable[[], object]) -> dict:
    """Error of an action, and its duration."""
    start = time.perf_counter()
    try:
        action()
        raised = None
    except CheckpointError as error:
        raised = [type(error).__name__, str(error)]
    return {"raised": raised, "seconds": time.perf_counter() - start}


def save_result(folder: Path, name: str, rank: int, value: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.{rank}.json").write_text(json.dumps(value))


def resume(rank: int, folder: Path, world: int) -> None:
    """Save after two steps and continue; a new engine that loads must give the same losses and client state."""
    for stage, bf16 in KINDS:
        name = f"stage{stage}-{'bf16' if bf16 else 'fp32'}"
        engine = make_engine(stage, bf16)
        train(engine, 2, bf16)
        client = {"position": 7 + rank, "rng": torch.get_rng_state()}
        path = save_deepspeed(engine, folder / f"w{world} [1], a=b é" / name, META, client)
        losses = train(engine, 2, bf16, start=2)
        again = make_engine(stage, bf16)
        restored = load_deepspeed(again, path)
        stock = make_engine(stage, bf16)
        with deepspeed_engine._glob_safe_path(path) as plain:
            stock.load_checkpoint(plain)
        trained = [t for k, t in read_checkpoint(path).state_dict.items() if "decoder.norm" not in k]
        save_result(folder, f"resume-w{world}-{name}", rank, {
            "losses": losses, "resumed": train(again, 2, bf16, start=2), "stock": train(stock, 2, bf16, start=2),
            "position": restored["position"], "rng": torch.equal(restored["rng"], client["rng"]),
            "steps": again.global_steps, "keys": sorted(restored), "dtypes": sorted({str(t.dtype) for t in trained}),
        })  # fmt: skip


def mismatch(rank: int, folder: Path) -> None:
    """One process loads directories of two processes, other stages, another precision, and a missing one."""
    other = folder / "w2 [1], a=b é"
    cases = {"world": (1, False, other / "stage1-fp32"), "stage": (0, False, other / "stage2-fp32"),
             "up": (1, False, other / "stage0-fp32"), "precision": (1, True, other / "stage1-fp32"),
             "absent": (0, False, other / "stage9"), "parent": (0, False, other)}  # fmt: skip
    for name, (stage, bf16, path) in cases.items():
        engine = make_engine(stage, bf16)
        before = [p.detach().clone() for p in engine.module.parameters()]
        result = run_action(lambda engine=engine, path=path: load_deepspeed(engine, path))
        result["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        save_result(folder, f"mismatch-{name}", rank, result)
    engine = make_engine(0, False)  # a replicated optimizer loads with any number of processes
    save_result(folder, "mismatch-replicated", rank, run_action(lambda: load_deepspeed(engine, other / "stage0-fp32")))


def full_disk(rank: int, folder: Path) -> None:
    """ENOSPC on one rank, in its shard or in rank 0's manifest: all ranks raise it, and the old checkpoint stays."""
    engine = make_engine(2, False)
    train(engine, 1, False)
    path = save_deepspeed(engine, folder / "full" / "last", META, {})
    stamp = verify_manifest(path)
    train(engine, 1, False, start=1)
    torch_writer, small_writer = deepspeed_engine.write_torch, manifest.write_bytes

    def fail(*_: object) -> str:
        raise OSError(28, "No space left on device")

    if rank == 1:
        deepspeed_engine.write_torch = fail
    first = run_action(lambda: save_deepspeed(engine, path, META, {}))
    deepspeed_engine.write_torch = torch_writer
    if rank == 0:
        manifest.write_bytes = fail
    second = run_action(lambda: save_deepspeed(engine, path, META, {}))
    manifest.write_bytes = small_writer
    result = {"first": first, "second": second, "old": verify_manifest(path) == stamp}
    torch.distributed.barrier()  # rank 0 cleans up after all ranks have the error
    result["left"] = sorted(os.listdir(path.parent))
    torch.distributed.barrier()
    tempfile.tempdir = str(folder / "no such folder")  # $TMPDIR is not needed
    save_deepspeed(engine, path, META, {})  # the engine still works
    tempfile.tempdir = None
    result["step"] = (verify_manifest(path) or {})["step"]
    save_result(folder, "full", rank, result)


def train_until_killed(rank: int, folder: Path, stage: int) -> None:
    """Train and save until killed."""
    engine = make_engine(stage, False)
    for step in range(10000):
        train(engine, 1, False, start=step)
        save_deepspeed(engine, folder / f"epoch={step:02d}-loss=1.0000", {**META, "epoch": step}, {})


def kill_between_shards(rank: int, folder: Path) -> None:
    """Save under the same name again; rank 1 is killed before it writes its shard."""
    engine = make_engine(2, False)
    train(engine, 1, False)
    save_deepspeed(engine, folder / "last", META, {})
    train(engine, 1, False, start=1)
    if rank == 1:
        deepspeed_engine.write_torch = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save_deepspeed(engine, folder / "last", META, {})


def inspect_folder(folder: Path) -> dict:
    """Find what a resume would use: the newest valid checkpoint, and the steps in all of its files."""
    unfinished = [n for n in os.listdir(folder) if n.startswith(".tmp-")]
    path = latest_valid_checkpoint(folder)
    if path is None:
        return {"found": False, "unfinished": unfinished}
    manifest = verify_manifest(path, full=True) or {}
    shards = [read_torch_file(f) for f in sorted((path / "checkpoint").iterdir()) if "optim" in f.name]
    steps = [adam_step(s) for s in shards]
    counted = read_torch_file(path / "checkpoint" / "mp_rank_00_model_states.pt")["global_steps"]
    complete = [n for n in os.listdir(folder) if not n.startswith(".")]
    return {
        "found": True,
        "unfinished": unfinished,
        "steps": [manifest["step"], counted, *steps],
        "complete": len(complete),
    }


def load_after_kill(rank: int, folder: Path, path: Path) -> None:
    engine = make_engine(2, False)
    load_deepspeed(engine, path)
    save_result(folder, "after-kill", rank, engine.global_steps)


def main(folder: Path) -> None:
    """Run all scenarios."""
    import_zero()
    results: dict = {"codes": {}}
    for world in (1, 2):
        results["codes"][f"resume{world}"] = launch(world, resume, folder, world)
    results["codes"]["mismatch"] = launch(1, mismatch, folder)
    results["codes"]["full"] = launch(2, full_disk, folder)
    kills = []
    draw = random.Random(0)
    for seed in range(5):
        target = folder / f"kill{seed}"
        target.mkdir()
        rank, saves, delay = draw.randrange(2), draw.randrange(1, 4), 0.2 * draw.random()

        def wait(target: Path = target, saves: int = saves, delay: float = delay) -> None:
            end = time.monotonic() + 300
            while len(list(target.glob("epoch=*"))) < saves and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(delay)

        launch(2, train_until_killed, target, (1, 2)[seed % 2], kill=(rank, wait))
        kills.append(inspect_folder(target))
    results["kills"] = kills
    newest = latest_valid_checkpoint(folder / "kill1")
    if newest:
        results["codes"]["after"] = launch(2, load_after_kill, folder, newest)
        results["after"] = (verify_manifest(newest) or {})["step"]
    (folder / "between").mkdir()
    results["codes"]["between"] = launch(2, kill_between_shards, folder / "between")
    results["between"] = inspect_folder(folder / "between")
    for file in folder.glob("*.json"):
        name, rank = file.name.removesuffix(".json").rsplit(".", 1)
        results.setdefault(name, {})[rank] = json.loads(file.read_text())
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    shutil.rmtree(folder / "between")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
