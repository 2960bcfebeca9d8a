"""DeepSpeed engines of one and two processes: resume to the last bit, agree on failure, survive SIGKILL.

engine_worker.py runs the scenarios; the tests judge what it wrote.
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


def test_all_ranks_ended(results: dict) -> None:
    codes = dict(results["codes"])
    assert codes.pop("between")[1] == -9
    assert all(code == 0 for ended in codes.values() for code in ended), codes


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bitwise(results: dict, kind: str, world: int) -> None:
    told = results[f"resume-w{world}-{kind}"]
    assert len(told) == world
    for rank, one in told.items():
        assert one["resumed"] == one["losses"]
        assert one["stock"] == one["losses"]  # DeepSpeed's own loader, without ours
        assert one["position"] == 7 + int(rank)  # each rank gets its own state back
        assert one["rng"]
        assert one["steps"] == 4
        assert one["keys"] == ["position", "rng"]
        assert one["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("case", "found", "wanted"),
    [
        ("world", "ZeRO stage 1, 2 processes, fp32", "ZeRO stage 1, 1 process, fp32"),
        ("stage", "ZeRO stage 2, 2 processes, fp32", "ZeRO stage 0, 1 process, fp32"),
        ("up", "ZeRO stage 0, 2 processes, fp32", "ZeRO stage 1, 1 process, fp32"),
        ("precision", "ZeRO stage 1, 2 processes, fp32", "ZeRO stage 1, 1 process, bf16"),
    ],
)
def test_another_layout_is_one_sentence(results: dict, case: str, found: str, wanted: str) -> None:
    told = results[f"mismatch-{case}"]["0"]
    kind, text = told["raised"]
    assert kind == "ResumeMismatchError"
    assert f"written with {found}, this run has {wanted}; " in text
    assert "convert_checkpoint.py" in text
    assert told["unchanged"]


def test_never_from_scratch(results: dict) -> None:
    assert "does not exist" in results["mismatch-absent"]["0"]["raised"][1]
    assert "a folder of 8 checkpoints" in results["mismatch-parent"]["0"]["raised"][1]
    assert results["mismatch-replicated"]["0"]["raised"] is None


def test_full_disk_on_one_rank(results: dict) -> None:
    told = results["full"]
    for attempt, rank in (("first", 1), ("second", 0)):
        texts = {one[attempt]["raised"][1] for one in told.values()}
        assert len(texts) == 1, texts
        assert f"not saved: rank {rank} of 2: [Errno 28] No space left on device" in texts.pop()
    for one in told.values():
        assert one["old"]
        assert one["left"] == ["last"]
        assert one["step"] == 2


def test_killed_at_random(results: dict) -> None:
    assert len(results["kills"]) == 5
    for told in results["kills"]:
        assert told["found"], told
        assert len(set(told["steps"])) == 1, told  # manifest, engine and Adam on every rank
        assert len(told["steps"]) == 4
    assert results["after-kill"] == {"0": results["after"], "1": results["after"]}


def test_killed_between_two_shards_of_a_resave(results: dict) -> None:
    assert results["between"] == {"found": True, "unfinished": [".tmp-last"], "steps": [1, 1, 1, 1], "complete": 1}
