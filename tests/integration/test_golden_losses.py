"""The losses of 20 steps equal those of commit ae7d5c0: see tests/golden/record.py."""

import json
from pathlib import Path

import pytest

from tests.golden.record import record

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[float]]]:
    return record(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("training", ["pretrain", "distill"])
def test_losses_equal_the_golden_ones(losses: dict[str, dict[str, list[float]]], training: str) -> None:
    expected = json.loads((GOLDEN / f"{training}.json").read_text())
    assert losses[training].keys() == expected.keys()
    for name, values in expected.items():
        assert losses[training][name] == pytest.approx(values, rel=1e-4), name
