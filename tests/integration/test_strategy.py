"""One ordinary checkpoint file with every strategy, ZeRO stage and number of processes, bit-identical on resume.

strategy_worker.py runs the distillations; the tests compare the files that they write.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import load_torch
from mmdistill.config import ConfigError
from mmdistill.distill.strategy import SingleFileDeepSpeedStrategy, strategy_kwargs
from mmdistill.distributed.process import INTERRUPTED_EXIT_CODE
from tests.commands import run_python
from tests.integration.strategy_worker import CROSS, INSIDE, KINDS, RESUMED, config_of, stopped

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strategies")
    run_python("-m", "tests.integration.strategy_worker", folder)
    return folder


def saved(runs: Path, name: str, epoch: int = 1) -> dict[str, Any]:
    """The checkpoint that a run saved at an epoch's end."""
    content: dict[str, Any] = load_torch(next((runs / name / "checkpoints").glob(f"epoch={epoch:02d}-*")))
    return content


def losses(runs: Path, name: str) -> list[str]:
    recorded: list[str] = json.loads((runs / name / "losses.json").read_text())
    return recorded


def epochs(runs: Path, name: str) -> list[dict[str, str]]:
    """The rows of a run's metrics."""
    with (runs / name / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Compare tensors and containers bit by bit."""
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


def assert_resumed(runs: Path, full: str, *parts: str) -> None:
    """The runs that resumed from the end of the first epoch together equal the uninterrupted run."""
    steps = losses(runs, full)
    assert [loss for part in parts for loss in losses(runs, part)] == steps[len(steps) // 2 :]
    assert all(losses(runs, part) for part in parts)
    a, b = saved(runs, full), saved(runs, parts[-1])
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert_same(a[key], b[key], key)
    assert a["mmdistill"]["loss"] == b["mmdistill"]["loss"]
    assert epochs(runs, full)[-1]["grad_norm"] == epochs(runs, parts[-1])[-1]["grad_norm"]


def test_all_ranks_ended(runs: Path) -> None:
    codes = json.loads((runs / "results.json").read_text())
    ended_early = {name: codes.pop(name) for name in list(codes) if name.endswith("-stopped")}
    assert all(code == 0 for ended in codes.values() for code in ended), codes
    assert all(code == INTERRUPTED_EXIT_CODE for ended in ended_early.values() for code in ended), ended_early


@pytest.mark.parametrize("name", [*RESUMED, "zero2-1-clipped", "bf16"])
def test_resume_is_bit_identical(runs: Path, name: str) -> None:
    assert_resumed(runs, name, f"{name}-stopped", f"{name}-resumed")


@pytest.mark.parametrize(("source", "target"), CROSS)
def test_another_strategy_loads_the_file_exactly(runs: Path, source: str, target: str) -> None:
    begun = torch.load(runs / f"{source}-to-{target}" / "begin.pt", weights_only=True)
    file = saved(runs, source, epoch=0)
    assert_same(dict(file["state_dict"]), dict(begun["state_dict"]))
    stored = file["optimizer_states"][0]
    assert_same(stored["state"], begun["optimizer"]["state"])
    assert [g["params"] for g in stored["param_groups"]] == [g["params"] for g in begun["optimizer"]["param_groups"]]
    assert saved(runs, f"{source}-to-{target}")["epoch"] == 1


def test_file_of_two_processes_resumes_in_one(runs: Path) -> None:
    """Up to rounding: losses of DeepSpeed and Lightning differ in the last bit also without a resume."""
    plain, engine = (
        [float.fromhex(loss) for loss in losses(runs, f"zero2-2-to-{target}")] for target in ("auto-1", "zero0-1")
    )
    assert len(plain) == 6
    assert engine == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("source", "target"), INSIDE)
def test_another_number_of_processes_resumes_inside_an_epoch(runs: Path, source: str, target: str) -> None:
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
def test_grad_norm_equals_that_of_the_plain_strategy(runs: Path, name: str, plain: str) -> None:
    found, expected = (float(epochs(runs, run)[0]["grad_norm"]) for run in (name, plain))
    assert expected > 0.01  # before clipping: the clipped runs clip to 0.01
    assert found == pytest.approx(expected, rel=1e-4)


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
    """6 batches, 4 per step: the last step has 2 batches, each weighted by 1/4, as in Lightning."""
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
def test_full_disk_on_rank_0_raises_on_both(runs: Path, strategy: str) -> None:
    results = [json.loads((runs / f"full-{strategy}.{rank}.json").read_text()) for rank in (0, 1)]
    assert "not saved" in results[0]["message"]
    assert "No space left on device" in results[0]["message"]
    assert results[1]["message"] == results[0]["message"]
    assert not [name for name in results[0]["files"] if name.endswith(".ckpt")]
    assert all(result["seconds"] < 60 for result in results)  # a collective would time out after 30 minutes


def test_stage_3_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy=deepspeed_stage_3: .* use strategy=deepspeed_stage_2"):
        config_of(tmp_path, "strategy=deepspeed_stage_3")
    with pytest.raises(ValueError, match=r"ZeRO stage 3: .* use stage 0, 1 or 2"):
        SingleFileDeepSpeedStrategy(3, batch_size=1)
    with pytest.raises(ValueError, match="offload needs ZeRO stage 1 or 2"):
        SingleFileDeepSpeedStrategy(0, batch_size=1, offload=True)


@pytest.mark.parametrize(("stage", "end"), [(1, ""), (1, "_offload"), (2, ""), (2, "_offload")])
def test_offload_follows_the_strategy_name(stage: int, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    strategy = strategy_kwargs(config_of(Path("nowhere"), f"strategy=deepspeed_stage_{stage}{end}"), "32")["strategy"]
    zero = strategy.config["zero_optimization"]
    assert (zero["stage"], "offload_optimizer" in zero) == (stage, bool(end))
