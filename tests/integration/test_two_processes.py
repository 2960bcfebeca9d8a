"""Both entrypoints with one and two processes: one folder, the same numbers, one policy for non-finite values.

The runs are one plan of `tests.integration.resume_worker`: one interpreter imports everything and forks the ranks
of each run.
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill.checkpoint import load_torch, read_checkpoint
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from tests.commands import run_python
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.multiprocess, pytest.mark.timeout(3000)]  # all runs take minutes on two cores
Runs = dict[str, Any]


def _pretrain(name: str, root: Path, data: list[str], *arguments: str, world: int = 1, **more: Any) -> Runs:
    common = ["modality=flow", *data, *MODEL, f"batch_size={8 // world}", "trainer.epochs=1", "accelerator=cpu"]
    return {
        "script": "pretrain_main.py", "world": world, "record": str(root / name),
        "arguments": [*common, *arguments, f"hydra.run.dir={root / name}"], **more,
    }  # fmt: skip


def _swept(run: Runs) -> Runs:
    return {**run, "arguments": [*run["arguments"], "-m"]}  # after the overrides, which must be consecutive


def _half_precision(stage: int, root: Path, data: list[str]) -> list[Runs]:
    """bf16: uninterrupted, and stopped in the second epoch and resumed."""
    given = (root, data, "precision=bf16", f"strategy=deepspeed_stage_{stage}", "trainer.epochs=2")
    parts = _pretrain(f"bf16_{stage}_parts", *given, stop_at=12)
    resumed = {**parts, "arguments": [*parts["arguments"], "resume=auto"], "stop_at": None}
    return [_pretrain(f"bf16_{stage}", *given), parts, resumed]


def _fp16(make: Any, name: str, root: Path, data: list[str], *arguments: str) -> list[Runs]:
    """One gradient overflows: uninterrupted, and stopped after that and resumed. max_skipped_steps is 0."""
    given = (root, data, "accelerator=auto", "precision=16", "trainer.max_skipped_steps=0", *arguments)
    parts = make(f"{name}_parts", *given, "trainer.epochs=2", inf_at=9, stop_at=12, fp16=True)
    resumed = {**parts, "arguments": [*parts["arguments"], "resume=auto"], "stop_at": None, "inf_at": None}
    full = make(name, *given, "trainer.epochs=2", inf_at=9, fp16=True)
    return [full, parts, resumed, make(f"{name}_all", *given, "trainer.epochs=3", inf_at=-1, fp16=True)]


def _infinite(root: Path, data: list[str]) -> list[Runs]:
    """Finite losses with an infinite gradient."""
    skip, inf, student = "trainer.on_nonfinite=skip", {"inf_at": 9}, ("test=False", "trainer.ema=0.9")
    zero = "strategy=deepspeed_stage_"
    return [
        _pretrain("inf_zero0", root, data, skip, world=2, **inf),
        _pretrain("inf_zero2", root, data, skip, "strategy=deepspeed_stage_2", world=2, **inf),
        _pretrain("inf_bf16", root, data, skip, "strategy=deepspeed_stage_1", "precision=bf16", **inf),
        _pretrain("inf_accumulated", root, data, skip, "trainer.accumulate_grad_batches=3", inf_at=-1),
        _pretrain("inf_raise", root, data, "strategy=deepspeed_stage_3", world=2, **inf),
        _distill("distill_inf", root, data, skip, *student, world=2, **inf),
        _distill("distill_inf_zero0", root, data, skip, *student, f"{zero}0", **inf),
        _distill("distill_inf_zero2", root, data, skip, *student, f"{zero}2", world=2, **inf),
        *_fp16(_pretrain, "fp16", root, data, "strategy=deepspeed_stage_0"),
        *_fp16(_pretrain, "fp16_zero2", root, data, "strategy=deepspeed_stage_2"),
        *_fp16(_distill, "distill_fp16", root, data, *student),
    ]


def _cached(root: Path, data: list[str]) -> list[Runs]:
    """Two mask draws, 70 of 72 clips per epoch, and an average of the student."""
    given = (root, data, "test=False", "trainer.ema=0.9", "trainer.cache_teacher_epochs=2", "trainer.epochs=4")
    return [
        _distill("cached_one", *given, "batch_size=10"),
        _distill("cached_two", *given, "batch_size=5", world=2, record_states=True),
        _distill("uncached_two", *given, "batch_size=5", world=2, uncached=True),
    ]


def _distill(name: str, root: Path, data: list[str], *arguments: str, world: int = 1, **more: Any) -> Runs:
    one = f"trainer.ckpt_path=[{','.join(str(root / m / 'checkpoints' / 'LAST') for m in _MODALITIES)}]"
    common = [
        one,
        *data,
        *EVAL,
        f"batch_size={8 // world}",
        "trainer.epochs=1",
        "accelerator=cpu",
        "baselines=[random]",
    ]
    return {
        "script": "lit_main_mmdistill.py", "world": world, "record": str(root / name),
        "arguments": [*common, "feature_cache=null", *arguments, f"hydra.run.dir={root / name}"], **more,
    }  # fmt: skip


_MODALITIES = ("rgb", "flow", "skeleton")
_BF16_STAGES = (0, 2)  # of ZeRO; test_deepspeed_engine.py covers all


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """The folder that holds all runs, and the exit codes of each run's ranks."""
    root = tmp_path_factory.mktemp("ranks")
    good = overrides(make_tiny(root / "data"))
    skip, nan, half = (
        "trainer.on_nonfinite=skip",
        {"nan_at": 9},
        "decoder_mask_ratio=0.5",
    )  # NaN at the last of 9 batches
    plan = [
        *(_pretrain(m, root, good, f"modality={m}") for m in _MODALITIES),
        _pretrain("one", root, good, "trainer.epochs=2", half),
        _pretrain("two", root, good, "trainer.epochs=2", half, "logger=[tensorboard,csv]", world=2),
        _pretrain("two_zero2", root, good, "trainer.epochs=2", half, "strategy=deepspeed_stage_2", world=2),
        _pretrain("short", root, good, world=2),
        _swept(_pretrain("sweep", root, good, "seed=0,1", f"hydra.sweep.dir={root / 'sweep'}", world=2)),
        _pretrain("raise", root, good, world=2, **nan),
        _pretrain("skip_one", root, good, skip, **nan),
        _pretrain("skip_two", root, good, skip, world=2, **nan),
        _pretrain("skip_zero1", root, good, skip, "strategy=deepspeed_stage_1", world=2, **nan),
        _pretrain(
            "skip_zero2", root, good, skip, "strategy=deepspeed_stage_2", "trainer.accumulate_grad_batches=3",
            world=2, **nan,
        ),
        _pretrain("budget", root, good, skip, "trainer.max_skipped_steps=0", **nan),
        _pretrain("stop", root, good, world=2, stop_at=3, stop_signal="SIGUSR1", stop_rank=1),
        *(run for stage in _BF16_STAGES for run in _half_precision(stage, root, good)),
        _distill("distill_one", root, good),
        _distill("distill_two", root, good, world=2),
        _distill("distill_raise", root, good, "test=False", world=2, **nan),
        _distill("distill_skip", root, good, "test=False", skip, "trainer.ema=0.9", world=2, **nan),
        _distill("distill_skip_zero2", root, good, "test=False", skip, "strategy=deepspeed_stage_2", world=2, **nan),
        *_infinite(root, good),
        *_cached(root, good),
    ]  # fmt: skip
    codes: list[list[int]] = []
    for number, part in enumerate((plan[:3], plan[3:])):
        for run in part:  # checkpoint names are known after the pretraining
            run["arguments"] = [_teachers_in(a, root) for a in run["arguments"]]
        file = root / f"plan{number}.json"
        file.write_text(json.dumps({"runs": part}))
        run_python("-m", "tests.integration.resume_worker", file)
        codes += json.loads(file.with_name(file.name + ".codes").read_text())
    shown: dict[str, list[int]] = {}
    for run, code in zip(plan, codes, strict=True):
        shown.setdefault(Path(run["record"]).name, []).extend(code)
    return root, shown


def _teachers_in(argument: str, root: Path) -> str:
    if not argument.startswith("trainer.ckpt_path"):
        return argument
    for modality in _MODALITIES:
        folder = root / modality / "checkpoints"
        found = [p.name for p in folder.glob("epoch=*")] or ["LAST"]
        argument = argument.replace(f"{folder / 'LAST'}", f"{folder / found[0]}")
    return argument


def _metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _log(root: Path, name: str) -> list[str]:
    return [(root / f"{name}.{rank}.log").read_text() for rank in range(2)]


def _finite(run: Path) -> bool:
    newest = max((run / "checkpoints").glob("epoch=*"), key=lambda p: p.stat().st_mtime)
    return all(bool(torch.isfinite(v).all()) for v in read_checkpoint(newest).state_dict.values())


@pytest.mark.parametrize("name", ["two", "two_zero2"])
def test_two_ranks_train_as_one(runs: tuple[Path, dict[str, list[int]]], name: str) -> None:
    root, codes = runs
    assert (codes["one"], codes[name]) == ([0], [0, 0]), _log(root, name)
    one, two = _metrics(root / "one"), _metrics(root / name)
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        assert float(b["loss"]) == pytest.approx(float(a["loss"]), rel=1e-5)
        assert float(b["grad_norm"]) == pytest.approx(float(a["grad_norm"]), rel=1e-3)
    assert [p.name for p in (root / name / "checkpoints").glob("epoch=*")] == [
        p.name for p in (root / "one" / "checkpoints").glob("epoch=*")
    ]


def test_ranks_share_one_folder(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, _ = runs
    assert len(list((root / "two").rglob("events.out.tfevents*"))) == 1
    assert not (ROOT / "checkpoints").exists()  # where another rank than 0 would write without rank 0's folder
    shown = _log(root, "two")
    assert "last checkpoint" in shown[0]
    assert "last checkpoint" not in shown[1]


def test_sweep_of_two_ranks_equals_separate_runs(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = runs
    assert (codes["short"], codes["sweep"]) == ([0, 0], [0, 0]), _log(root, "sweep")
    first, second = (_metrics(root / "sweep" / f"pretrain_flow_{job}")[0] for job in range(2))
    assert first["loss"] == _metrics(root / "short")[0]["loss"] != second["loss"]
    assert len(list((root / "sweep").rglob("checkpoints"))) == 2


def test_distillation_and_evaluation_of_two_ranks_equal_one(
    runs: tuple[Path, dict[str, list[int]]],
) -> None:
    root, codes = runs
    assert (codes["distill_one"], codes["distill_two"]) == ([0], [0, 0]), _log(root, "distill_two")
    losses = [read_checkpoint(root / f"distill_{n}" / "checkpoints" / "last.ckpt").meta["loss"] for n in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (json.loads((root / f"distill_{n}" / "fewshot.json").read_text()) for n in ("one", "two"))
    untrained = [run["settings"][0]["rows"]["random"]["top1_action_ensemble"] for run in (one, two)]
    assert untrained[0] == untrained[1]  # the same weights, so the sharded evaluation must not change anything
    assert two["episodes"] == one["episodes"]


@pytest.mark.parametrize("name", ["raise", "distill_raise"])
def test_nan_on_one_rank_stops_all_with_one_message(runs: tuple[Path, dict[str, list[int]]], name: str) -> None:
    root, codes = runs
    assert codes[name] == [1, 1], _log(root, name)
    shown = "".join(_log(root, name))
    assert shown.count("loss is nan at step") == 1
    names = shown.partition("Clips: ")[2].partition("\n")[0].split(", ")
    assert len(names) == 4  # those of the one rank
    assert all(name.startswith("rally_") for name in names)
    assert "Traceback" not in shown
    assert not list((root / name / "checkpoints").glob("epoch=*"))


@pytest.mark.parametrize("name", ["skip_one", "skip_two", "skip_zero1", "skip_zero2"])
def test_nonfinite_step_is_skipped(runs: tuple[Path, dict[str, list[int]]], name: str) -> None:
    root, codes = runs
    assert set(codes[name]) == {0}, (root / f"{name}.0.log").read_text()
    row = _metrics(root / name)[-1]
    assert np.isfinite(float(row["loss"]))
    assert _finite(root / name)
    # with three batches per step the other two are finite, and the step uses them
    assert float(row["skipped_steps"]) == (0 if name == "skip_zero2" else 1)
    if name != "skip_zero2":
        assert "skipped step 1 of at most 10: loss is not finite at step" in (root / f"{name}.0.log").read_text()


_SKIPPED = ["skip_one", "skip_two", "skip_zero1", "inf_zero0", "inf_zero2", "inf_bf16", "distill_skip",
            "distill_skip_zero2", "distill_inf", "distill_inf_zero0", "distill_inf_zero2"]  # fmt: skip


@pytest.mark.parametrize("name", _SKIPPED)
def test_skipped_step_changes_no_state(runs: tuple[Path, dict[str, list[int]]], name: str) -> None:
    """Weights, averages, Adam's moments and its count of steps: to the last bit, on every rank."""
    root, codes = runs
    assert set(codes[name]) == {0}, (root / f"{name}.0.log").read_text()
    assert _changed(root, name) == [[True] * 8 + [False]] * len(codes[name])
    why = "gradient" if "inf" in name else "loss"
    shown = (root / f"{name}.0.log").read_text()
    assert shown.count(f"skipped step 1 of at most 10: {why} is not finite at step 8") == 1
    assert float(_metrics(root / name)[-1]["skipped_steps"]) == 1


def _changed(root: Path, name: str) -> list[list[bool]]:
    """By rank and batch: whether weights, averages or moments change."""
    files = sorted(root.glob(f"{name}.*.states.jsonl"))
    return [[a != b for a, b in map(json.loads, file.read_text().splitlines())] for file in files]


def test_accumulated_gradients_are_dropped(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = runs
    assert codes["inf_accumulated"] == [0]
    assert _changed(root, "inf_accumulated") == [[False] * 9]
    assert float(_metrics(root / "inf_accumulated")[-1]["skipped_steps"]) == 3


def test_infinite_gradient_stops_all_ranks(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = runs
    assert codes["inf_raise"] == [1, 1]
    shown = "".join(_log(root, "inf_raise"))
    assert shown.count("gradient is not finite at step 8 (epoch 0); weights were not changed") == 1


@pytest.mark.parametrize("name", ["fp16", "fp16_zero2", "distill_fp16"])
def test_overflow_lowers_the_loss_scale_and_is_not_a_skipped_step(
    runs: tuple[Path, dict[str, list[int]]], name: str
) -> None:
    """The schedule advances; the scale and the counts survive a resume."""
    root, codes = runs
    assert codes[name] == [0], (root / f"{name}.0.log").read_text()
    assert codes[f"{name}_parts"] == [INTERRUPTED_EXIT_CODE, 0], (root / f"{name}_parts.0.log").read_text()
    assert _changed(root, name) == [[True] * 8 + [False] + [True] * 9]
    full, parts = _metrics(root / name), _metrics(root / f"{name}_parts")
    for row, step in zip(full, (9, 18), strict=True):
        found = [float(row[k]) for k in ("step", "overflow_steps", "skipped_steps", "loss_scale")]
        assert found == [step, 1, 0, 2**15]
    timed = ("clips_per_s", "data_wait_percent", "mfu_percent")
    assert [{k: v for k, v in r.items() if k not in timed} for r in parts] == [
        {k: v for k, v in r.items() if k not in timed} for r in full
    ]


@pytest.mark.parametrize("name", ["fp16", "fp16_zero2", "distill_fp16"])
def test_overflow_at_every_loss_scale_is_nonfinite(runs: tuple[Path, dict[str, list[int]]], name: str) -> None:
    root, codes = runs
    assert codes[f"{name}_all"] == [1]
    assert "gradient is not finite at step 16 (epoch 1)" in (root / f"{name}_all.0.log").read_text()
    assert not any(_changed(root, f"{name}_all")[0])


def test_max_skipped_steps_stops_the_run(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = runs
    assert codes["budget"] == [1]
    shown = (root / "budget.0.log").read_text()
    assert "trainer.max_skipped_steps=0 allows no more" in shown
    assert "Clips: rally_" in shown


@pytest.mark.parametrize("name", ["distill_skip", "distill_skip_zero2"])
def test_distillation_skips_nonfinite_steps(runs: tuple[Path, dict[str, list[int]]], name: str) -> None:
    root, codes = runs
    assert codes[name] == [0, 0], _log(root, name)
    checkpoint = read_checkpoint(root / name / "checkpoints" / "last.ckpt")
    assert all(bool(torch.isfinite(v).all()) for v in checkpoint.state_dict.values())
    assert np.isfinite(checkpoint.meta["loss"])
    assert checkpoint.meta["skipped_steps"] == 1
    assert "skipped step 1 of at most 10" in _log(root, name)[0]


def test_ema_and_cache_of_two_ranks_equal_one(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, codes = runs
    found = [codes[name] for name in ("cached_one", "cached_two", "uncached_two")]
    assert found == [[0], [0, 0], [0, 0]], _log(root, "cached_two")
    first, second = ((root / f"cached_two.{rank}.states.jsonl").read_text() for rank in range(2))
    assert first == second  # weights, averages and moments of the two ranks, after each batch
    one, two = (load_torch(root / f"cached_{n}" / "checkpoints" / "last.ckpt")["state_dict"] for n in ("one", "two"))
    averages = [k for k in one if k.startswith("student_ema_rgb.")]
    assert averages
    assert all(torch.allclose(two[k], one[k], rtol=0, atol=1e-6) for k in averages)
    assert any(not torch.equal(two[k], two[k.replace("_ema", "")]) for k in averages)
    files = sorted(p.relative_to(root / "cached_one") for p in (root / "cached_one" / "teacher_features").rglob("*"))
    assert [p.name for p in files[1:]] == ["draw_0.npy", "draw_0_known.npy", "draw_1.npy", "draw_1_known.npy"]
    for path in files[1:]:
        a, b = (np.load(root / name / path) for name in ("cached_one", "cached_two"))
        assert a.any()
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert "2 of 72 clips computed" in _log(root, "cached_two")[0]


def test_cached_losses_of_two_ranks_equal_uncached(runs: tuple[Path, dict[str, list[int]]]) -> None:
    root, _ = runs
    for rank in range(2):
        cached, uncached = (
            [json.loads(line) for line in (root / f"{name}.{rank}.jsonl").read_text().splitlines()]
            for name in ("cached_two", "uncached_two")
        )
        assert len(cached) == 28
        assert [c[:2] for c in cached] == [u[:2] for u in uncached]
        losses = [[float.fromhex(step[2]) for step in steps] for steps in (cached, uncached)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_signal_to_one_rank_stops_all_with_a_checkpoint(runs: tuple[Path, dict[str, list[int]]]) -> None:
    """Of the signals in test_signals.py, one is enough here: the ranks exchange whether any signal has arrived."""
    root, codes = runs
    assert codes["stop"] == [INTERRUPTED_EXIT_CODE] * 2, _log(root, "stop")
    assert len(list((root / "stop" / "checkpoints").glob("epoch=00-*-step=3"))) == 1


@pytest.mark.parametrize("stage", _BF16_STAGES)
def test_bf16_resume_is_bit_identical(runs: tuple[Path, dict[str, list[int]]], stage: int) -> None:
    root, codes = runs
    name = f"bf16_{stage}"
    assert codes[name] == [0], (root / f"{name}.0.log").read_text()
    assert codes[f"{name}_parts"] == [INTERRUPTED_EXIT_CODE, 0], (root / f"{name}_parts.0.log").read_text()
    full, parts = _metrics(root / name), _metrics(root / f"{name}_parts")
    assert [row["loss"] for row in parts] == [row["loss"] for row in full]
    assert float(full[1]["loss"]) < float(full[0]["loss"])
    assert float(full[0]["loss"]) == pytest.approx(float(_metrics(root / "one")[0]["loss"]), rel=0.05)
    assert float(full[0]["grad_norm"]) > 0
