"""One ordinary checkpoint file under every strategy, stage and number of processes: nothing lost, nothing changed.

strategy_worker.py runs the distillations; the tests compare what they wrote to the last bit.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import load_torch
from mmdistill.config import ConfigError
from mmdistill.distill.strategy import OneFileDeepSpeed, strategy_kwargs
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from tests.commands import run_python
from tests.integration.strategy_worker import CROSS, INSIDE, KINDS, RESUMED, config_of, stopped


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    run_python("-m", "tests.integration.strategy_worker", folder)
    return folder


def saved(runs: Path, name: str, epoch: int = 1) -> dict[str, Any]:
    """What a run saved at an epoch's end."""
    content: dict[str, Any] = load_torch(next((runs / name / "checkpoints").glob(f"epoch={epoch:02d}-*")))
    return content


def losses(runs: Path, name: str) -> list[str]:
    told: list[str] = json.loads((runs / name / "losses.json").read_text())
    return told


def epochs(runs: Path, name: str) -> list[dict[str, str]]:
    """The rows of a run's metrics."""
    with (runs / name / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, tensors, containers and all."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{where}/{number}")
    else:
        assert a == b, where


def assert_resumed(runs: Path, whole: str, *parts: str) -> None:
    """Runs that went on from the first epoch's end did together what the uninterrupted one did."""
    steps = losses(runs, whole)
    assert [loss for part in parts for loss in losses(runs, part)] == steps[len(steps) // 2 :]
    assert all(losses(runs, part) for part in parts)
    a, b = saved(runs, whole), saved(runs, parts[-1])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(a[key], b[key], key)
    assert a["mmdistill"]["loss"] == b["mmdistill"]["loss"]
    assert epochs(runs, whole)[-1]["grad_norm"] == epochs(runs, parts[-1])[-1]["grad_norm"]


def test_all_ranks_ended(runs: Path) -> None:
    codes = json.loads((runs / "results.json").read_text())
    ended_early = {name: codes.pop(name) for name in list(codes) if name.endswith("-stopped")}
    assert all(code == 0 for ended in codes.values() for code in ended), codes
    assert all(code == INTERRUPTED_EXIT_CODE for ended in ended_early.values() for code in ended), ended_early


@pytest.mark.parametrize("name", [*RESUMED, "zero2-1-clipped", "bf16"])
def test_resume_at_an_epochs_end_and_inside_one_is_bitwise(runs: Path, name: str) -> None:
    assert_resumed(runs, name, f"{name}-stopped", f"{name}-resumed")


@pytest.mark.parametrize(("source", "target"), CROSS)
def test_another_strategy_starts_from_exactly_what_the_file_holds(runs: Path, source: str, target: str) -> None:
    begun = torch.load(runs / f"{source}-to-{target}" / "begin.pt", weights_only=True)
    file = saved(runs, source, epoch=0)
    assert_same(dict(file["state_dict"]), dict(begun["state_dict"]))
    stored = file["optimizer_states"][0]
    assert_same(stored["state"], begun["optimizer"]["state"])
    assert [g["params"] for g in stored["param_groups"]] == [g["params"] for g in begun["optimizer"]["param_groups"]]
    assert saved(runs, f"{source}-to-{target}")["epoch"] == 1


def test_a_file_of_two_processes_trains_on_alike_in_one(runs: Path) -> None:
    """But for rounding: an engine's losses leave Lightning's by a last bit after some steps from scratch too."""
    plain, engine = (
        [float.fromhex(loss) for loss in losses(runs, f"zero2-2-to-{target}")] for target in ("auto-1", "zero0-1")
    )
    assert len(plain) == 6
    assert engine == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("source", "target"), INSIDE)
def test_another_number_of_processes_goes_on_inside_the_epoch(runs: Path, source: str, target: str) -> None:
    name = f"{source}-inside-{target}"
    begun, file = torch.load(runs / name / "begin.pt"), load_torch(stopped(runs, source))
    assert_same(dict(file["state_dict"]), dict(begun["state_dict"]))
    assert_same(file["optimizer_states"][0]["state"], begun["optimizer"]["state"])
    assert len(losses(runs, name)) == len(losses(runs, f"{source}-resumed"))
    ended, other = saved(runs, name), saved(runs, f"{source}-resumed")
    assert ended["global_step"] == other["global_step"]
    assert ended["mmdistill"]["loss"] == pytest.approx(other["mmdistill"]["loss"], rel=0.05)  # other masks


@pytest.mark.parametrize(
    ("name", "plain"),
    [("zero0-1", "auto-1"), ("zero1-1", "auto-1"), ("zero2-1", "auto-1"), ("zero1-2", "ddp-2"), ("zero2-2", "ddp-2"),
     ("zero0-2", "ddp-2"), ("zero0-1-clipped", "auto-1-clipped"), ("zero2-1-clipped", "auto-1-clipped")],
)  # fmt: skip
def test_the_norm_of_the_gradient_is_that_of_the_plain_strategy(runs: Path, name: str, plain: str) -> None:
    told, wanted = (float(epochs(runs, run)[0]["grad_norm"]) for run in (name, plain))
    assert wanted > 0.01  # also where it is clipped to that
    assert told == pytest.approx(wanted, rel=1e-4)


def test_files_have_one_layout(runs: Path) -> None:
    plain = saved(runs, "auto-1")
    for kind in KINDS:
        file = next((runs / kind / "checkpoints").glob("epoch=01-*"))
        assert file.is_file()
        content = load_torch(file)
        assert set(content) == set(plain)
        assert list(content["state_dict"]) == list(plain["state_dict"])
        state = content["optimizer_states"][0]["state"]
        assert [sorted(entry) for entry in state.values()] == [["exp_avg", "exp_avg_sq", "step"]] * len(state)
        assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in content["state_dict"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_of_one_element_keeps_its_moments(runs: Path, kind: str) -> None:
    content = saved(runs, kind)
    single = [e for e in content["optimizer_states"][0]["state"].values() if e["exp_avg"].shape == (1,)]
    assert len(single) == 1
    assert single[0]["exp_avg"].item() != 0
    assert single[0]["exp_avg_sq"].item() > 0
    assert content["state_dict"]["cmt.gain"].item() != 1


def test_accumulation_and_clipping_as_in_plain_lightning(runs: Path) -> None:
    """6 batches, 4 to a step: the step at the epoch's end has 2, and its loss is a fourth of each, as in Lightning."""
    plain = saved(runs, "auto-1-clipped")
    assert plain["global_step"] == 4
    assert losses(runs, "auto-1-clipped") != losses(runs, "auto-1")
    for kind in ("zero0-1", "zero2-1"):
        other = saved(runs, f"{kind}-clipped")
        assert other["global_step"] == 4
        for name, value in plain["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][name], value, rtol=1e-4, atol=1e-6)


def test_bf16_computes_as_plain_lightning_and_keeps_weights_in_float32(runs: Path) -> None:
    content = saved(runs, "bf16")
    assert {v.dtype for v in content["state_dict"].values() if v.is_floating_point()} == {torch.float32}
    assert losses(runs, "bf16")[0] == losses(runs, "bf16-auto")[0] != losses(runs, "zero2-1")[0]


def test_directory_of_stock_lightning_resumes(runs: Path) -> None:
    assert (runs / "stock" / "stock.ckpt").is_dir()
    assert_resumed(runs, "stock", "stock-resumed")


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_full_disk_on_rank_0_is_told_on_both(runs: Path, strategy: str) -> None:
    told = [json.loads((runs / f"full-{strategy}.{rank}.json").read_text()) for rank in (0, 1)]
    assert "not saved" in told[0]["told"]
    assert "No space left on device" in told[0]["told"]
    assert told[1]["told"] == told[0]["told"]
    assert not [name for name in told[0]["left"] if name.endswith(".ckpt")]
    assert told[0]["seconds"] < 60  # and not the half hour of a collective
    assert told[1]["seconds"] < 60  # and not the half hour of a collective


def test_stage_3_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy=deepspeed_stage_3: .* use strategy=deepspeed_stage_2"):
        config_of(tmp_path, "strategy=deepspeed_stage_3")
    with pytest.raises(ValueError, match=r"ZeRO stage 3: .* use stage 0, 1 or 2"):
        OneFileDeepSpeed(3, batch_size=1)
    with pytest.raises(ValueError, match="stage 0 shards nothing"):
        OneFileDeepSpeed(0, batch_size=1, offload=True)


@pytest.mark.parametrize(("stage", "end"), [(1, ""), (1, "_offload"), (2, ""), (2, "_offload")])
def test_a_strategys_name_says_what_is_offloaded(stage: int, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    strategy = strategy_kwargs(config_of(Path("nowhere"), f"strategy=deepspeed_stage_{stage}{end}"), "32", [])[
        "strategy"
    ]
    zero = strategy.config["zero_optimization"]
    assert (zero["stage"], "offload_optimizer" in zero) == (stage, bool(end))
