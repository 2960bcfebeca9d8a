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
from functools import partial
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from mmdistill.checkpoint import (
    CheckpointError,
    deepspeed_engine,
    latest_valid_checkpoint,
    load_deepspeed,
    read_checkpoint,
    save_deepspeed,
)
from mmdistill.checkpoint.formats import manifest
from mmdistill.checkpoint.formats.deepspeed_zero import adam_step, read_model_states
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.formats.zero_slices import MASTERS, read_zero_state
from mmdistill.distributed.process import disable_shm_op
from tests.ranks import fork_ranks, import_zero, wait_for
from tests.unit.checkpoint.make_fixtures import cast_key_bias, config, engine_for, model, train

KINDS = [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True), (3, False), (3, True)]
STAGES = {1: (0, 1, 2, 3), 2: (1, 2, 3)}  # number of processes -> stages of training states that are resliced
META = {"kind": "pretrain", "epoch": 1, "loss": 0.5, "modality": "rgb"}


def resliced_stages(world: int) -> list[tuple[int, int]]:
    """Stages of directories of the other number of processes, and of the engines that load them.

    Both directions together combine each stage of one process with each stage of two once.
    """
    sources, stages = STAGES[3 - world], STAGES[world]
    return [(a, b) for a in sources for b in stages if (a + b) % 2 == (world == 2)]


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


def in_order(rank: int, scenarios: list[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
    """Several scenarios in the same processes."""
    for scenario, args in scenarios:
        scenario(rank, *args)


def train_on_two_clips(engine, steps: int, start: int, world: int) -> list[float]:
    """Steps on two clips, which the ranks share; the mean losses over both clips."""
    losses = []
    for step in range(start, start + steps):
        clips = torch.randn(2, 3, 2, 8, 8, generator=torch.Generator().manual_seed(step))
        own = clips[torch.distributed.get_rank() :: world]
        prediction, _ = engine(own, torch.tensor([[0, 1]]).expand(len(own), 2))
        loss = prediction.square().mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(float(total) / world)
    return losses


def write_states(rank: int, folder: Path, world: int) -> None:
    """Save at each stage after four steps. One engine continues for ten: the losses do not depend on the stage."""
    for stage in STAGES[world]:
        engine = make_engine(stage, False)
        train_on_two_clips(engine, 4, 0, world)
        save_deepspeed(engine, folder / f"states-w{world}" / f"stage{stage}", META, {"position": rank})
    save_result(folder, f"states-w{world}", rank, train_on_two_clips(engine, 10, 4, world))


def is_same_state(a: Path, b: Path) -> bool:
    """Whether two directories have the same bits in weights, masters, moments, step and hyperparameters."""
    states = [read_zero_state(p / "checkpoint", read_model_states(p / "checkpoint")) for p in (a, b)]
    one, other = ([state.merge(kind) for kind in (MASTERS, *state.moments)] for state in states)
    one.append(read_checkpoint(a).state_dict)
    other.append(read_checkpoint(b).state_dict)
    scales = [{key: state.loss_scale.get(key) for key in ("cur_scale", "cur_iter", "dynamic")} for state in states]
    return (
        len(one) == 4
        and all(
            x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(one, other, strict=True)
        )
        and [list(group) for group in states[0].groups] == [list(group) for group in states[1].groups]
        and torch.equal(states[0].step, states[1].step)
        and (scales[0] == scales[1] or not scales[0]["dynamic"])
    )


def load_states(rank: int, folder: Path, world: int, other: int) -> None:
    """Load directories of other processes at another stage, save them again, and continue for ten steps."""
    for source, stage in resliced_stages(world):
        path, engine = folder / f"states-w{other}" / f"stage{source}", make_engine(stage, False)
        client = load_deepspeed(engine, path)
        again = save_deepspeed(engine, folder / "again" / "last", META, client)
        same = rank > 0 or is_same_state(path, again)
        save_result(folder, f"elastic-stage{source}-w{world}-stage{stage}", rank, {
            "losses": train_on_two_clips(engine, 10, 4, world), "same": same, "client": client,
            "steps": engine.global_steps,
        })  # fmt: skip


def make_fp16_engine(stage: int):
    """An engine with a dynamic loss scale; DeepSpeed's check that the CPU has fp16 is removed."""
    CPU_Accelerator.is_fp16_supported = lambda self: True
    net = model()
    fp16 = {"enabled": True, "hysteresis": 1, "initial_scale_power": 7}
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    settings = {**config(stage, False), "fp16": fp16}
    settings.pop("optimizer")
    return deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]


def write_fp16(rank: int, folder: Path) -> None:
    """Save at stage 2 with a loss scale that is not the initial one."""
    engine = make_fp16_engine(2)
    engine.optimizer.loss_scaler.cur_iter = 7
    engine.optimizer.loss_scale = 64.0
    for name in ("one", "two"):  # a state without steps, too
        save_deepspeed(engine, folder / "fp16" / name, META, {})
        prediction, _ = engine(torch.ones(1, 3, 2, 8, 8).half(), torch.tensor([[0, 1]]))
        engine.backward(prediction.float().square().mean())
        engine.step()


def load_low_precision(rank: int, folder: Path) -> None:
    """One process loads bf16 and fp16 directories of two at other stages, and saves them again."""
    other = folder / "w2 [1], a=b é"
    cases = [(3, 0), (1, 3), (0, 2), (2, 1)]
    for source, stage in cases:
        path, engine = other / f"stage{source}-bf16", make_engine(stage, True)
        again = save_deepspeed(engine, folder / "again" / "last", META, load_deepspeed(engine, path))
        save_result(folder, f"elastic-bf16-{source}-{stage}", rank, is_same_state(path, again))
    path = folder / "fp16" / "two"
    for stage in (0, 3, 1, 0):
        engine = make_fp16_engine(stage)
        again = save_deepspeed(engine, folder / "again" / f"fp16-{stage}", META, load_deepspeed(engine, path))
        save_result(folder, f"elastic-fp16-{stage}", rank, [is_same_state(path, again), engine.optimizer.loss_scale])
        path = again
    engine = make_fp16_engine(0)
    load_deepspeed(engine, folder / "fp16" / "one")
    save_result(folder, "elastic-unstepped", rank, [engine.optimizer.loss_scale, len(engine.optimizer.optimizer.state)])


def mismatch(rank: int, folder: Path) -> None:
    """One process loads directories of another precision, another model, and a missing one."""
    other = folder / "w2 [1], a=b é"
    cases = {"precision": (1, True, other / "stage1-fp32"), "absent": (0, False, other / "stage9"),
             "parent": (0, False, other)}  # fmt: skip
    for name, (stage, bf16, path) in cases.items():
        engine = make_engine(stage, bf16)
        before = [p.detach().clone() for p in engine.module.parameters()]
        result = run_action(lambda engine=engine, path=path: load_deepspeed(engine, path))
        result["unchanged"] = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
        save_result(folder, f"mismatch-{name}", rank, result)
    for stage in (0, 1, 3):
        net = model()
        net.encoder_to_decoder.requires_grad_(False)
        engine = engine_for(net, stage, False)
        action = partial(load_deepspeed, engine, folder / "states-w2" / "stage2")
        save_result(folder, f"mismatch-model{stage}", rank, run_action(action))
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
    one: list = [(resume, (folder, 1)), (write_states, (folder, 1))]
    two: list = [(resume, (folder, 2)), (write_states, (folder, 2)), (load_states, (folder, 2, 1))]
    results["codes"]["resume1"] = launch(1, in_order, one)
    results["codes"]["resume2"] = launch(2, in_order, [*two, (write_fp16, (folder,))])
    others: list = [(load_states, (folder, 1, 2)), (load_low_precision, (folder,)), (mismatch, (folder,))]
    results["codes"]["others"] = launch(1, in_order, others)
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
