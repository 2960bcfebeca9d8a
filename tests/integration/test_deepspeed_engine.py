"""DeepSpeed engines of one and two processes: bit-identical resume, common errors, checkpoints after SIGKILL.

deepspeed_engine_worker.py runs the scenarios; the tests check its results.
"""

import json

import pytest

from tests.commands import run_python

pytestmark = pytest.mark.multiprocess
KINDS = [f"stage{stage}-{precision}" for precision in ("fp32", "bf16") for stage in range(4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engines")
    run_python("-m", "tests.integration.deepspeed_engine_worker", folder)
    return json.loads((folder / "results.json").read_text())


def test_all_ranks_ended_normally(results: dict) -> None:
    codes = dict(results["codes"])
    assert codes.pop("between")[1] == -9
    assert all(code == 0 for ended in codes.values() for code in ended), codes


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(results: dict, kind: str, world: int) -> None:
    scenario = results[f"resume-w{world}-{kind}"]
    assert len(scenario) == world
    for rank, result in scenario.items():
        assert result["resumed"] == result["losses"]
        assert result["stock"] == result["losses"]  # DeepSpeed's own loader, without ours
        assert result["position"] == 7 + int(rank)  # each rank gets its own state
        assert result["rng"]
        assert result["steps"] == 4
        assert result["keys"] == ["position", "rng"]
        assert result["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("world", "source", "stage"),
    [(1, 1, 1), (1, 1, 3), (1, 2, 0), (1, 2, 2), (1, 3, 1), (1, 3, 3),
     (2, 0, 1), (2, 0, 3), (2, 1, 2), (2, 2, 1), (2, 2, 3), (2, 3, 2)],
)  # fmt: skip
def test_another_world_size_and_stage_continue_the_training(results: dict, world: int, source: int, stage: int) -> None:
    """The same two clips per step: the losses of the next ten steps are those of the original processes."""
    expected = results[f"states-w{3 - world}"]["0"]
    assert len(expected) == 10
    scenario = results[f"elastic-stage{source}-w{world}-stage{stage}"]
    assert len(scenario) == world
    for rank, result in scenario.items():
        assert result["losses"] == pytest.approx(expected, abs=1e-5, rel=0)
        assert result["same"]  # each weight, master and moment, the step and the groups, bit by bit
        assert result["steps"] == 14
        assert result["client"] == {"position": 0 if world == 2 else int(rank)}


def test_low_precision_masters_and_loss_scale_are_resliced(results: dict) -> None:
    for source, stage in [(3, 0), (1, 3), (0, 2), (2, 1)]:
        assert results[f"elastic-bf16-{source}-{stage}"] == {"0": True}
    for stage in (0, 3, 1):
        assert results[f"elastic-fp16-{stage}"] == {"0": [True, 64.0]}
    assert results["elastic-unstepped"] == {"0": [64.0, 0]}


def test_another_precision_is_one_error_that_names_both(results: dict) -> None:
    scenario = results["mismatch-precision"]["0"]
    kind, text = scenario["raised"]
    assert kind == "ResumeMismatchError"
    own = "this run has ZeRO stage 1, 1 process, precision=bf16; "
    assert f"written with ZeRO stage 1, 2 processes, precision=32, {own}" in text
    assert "mmdistill convert" in text
    assert scenario["unchanged"]


def test_other_parameters_are_one_error_that_names_the_first(results: dict) -> None:
    for stage in (0, 1, 3):
        kind, text = results[f"mismatch-model{stage}"]["0"]["raised"]
        assert kind == "ResumeMismatchError"
        assert "(checkpoint / run): encoder_to_decoder.weight (4, 8) / None; " in text


def test_missing_checkpoint_is_an_error(results: dict) -> None:
    assert "does not exist" in results["mismatch-absent"]["0"]["raised"][1]
    assert "contains 8 checkpoints" in results["mismatch-parent"]["0"]["raised"][1]
    assert results["mismatch-replicated"]["0"]["raised"] is None


def test_full_disk_on_one_rank_is_the_same_error_on_all(results: dict) -> None:
    scenario = results["full"]
    for attempt, rank in (("first", 1), ("second", 0)):
        texts = {result[attempt]["raised"][1] for result in scenario.values()}
        assert len(texts) == 1, texts
        assert f"not saved: rank {rank} of 2: [Errno 28] No space left on device" in texts.pop()
    for result in scenario.values():
        assert result["old"]
        assert result["left"] == ["last"]
        assert result["step"] == 2


def test_newest_checkpoint_is_valid_after_a_kill(results: dict) -> None:
    assert len(results["kills"]) == 5
    for scenario in results["kills"]:
        assert scenario["found"], scenario
        assert len(set(scenario["steps"])) == 1, scenario  # manifest, engine and Adam on every rank
        assert len(scenario["steps"]) == 4
    assert results["after-kill"] == {"0": results["after"], "1": results["after"]}


def test_previous_checkpoint_is_valid_after_a_kill_between_two_shards(results: dict) -> None:
    assert results["between"] == {"found": True, "unfinished": [".tmp-last"], "steps": [1, 1, 1, 1], "complete": 1}
