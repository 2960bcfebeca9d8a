"""Collectives on two ranks."""

import json
from typing import Any

import pytest

from tests.commands import run_python

pytestmark = pytest.mark.multiprocess


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the collectives returned, by rank."""
    folder = tmp_path_factory.mktemp("collectives")
    run_python("-m", "tests.integration.collectives_worker", folder)
    return [{**json.loads((folder / f"{rank}.json").read_text()), "folder": str(folder)} for rank in range(2)]


def test_ranks_are_numbered(results: list[dict[str, Any]]) -> None:
    assert [result["rank"] for result in results] == [[0, 2, True], [1, 2, True]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", [0.5, 1.5]),
        ("sum", [[3.0, 4.0]]),
        ("any", [False, True, True]),
        ("gather", [{"rank": 0}, {"rank": 1}]),
        ("broadcast", "from 0"),
        ("all succeed", [0, 1]),
        ("one fails", ["CheckpointError", "saving: rank 1 of 2: disk is full"]),
    ],
)
def test_every_rank_has_the_same_result(name: str, expected: Any, results: list[dict[str, Any]]) -> None:
    assert [result[name] for result in results] == [expected, expected]


def test_run_dir_is_that_of_rank_zero(results: list[dict[str, Any]]) -> None:
    assert {result["run_dir"] for result in results} == {f"{results[0]['folder']}/0"}


def test_defect_is_raised_unchanged_on_its_own_rank(results: list[dict[str, Any]]) -> None:
    assert results[1]["defect"] == ["TypeError", "a defect"]
    assert results[0]["defect"] == ["MMDistillError", "saving: rank 1 of 2: TypeError: a defect"]
