"""benchmarks/train.py: its count of the arithmetic is torch's own, and both comparisons compute the same losses."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "train.py"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def _counted(step: Any) -> int:
    """FLOPs by torch's counter, which knows the products of the plain attention, and sees no other thread's."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def test_pretraining_arithmetic_and_losses(bench: dict[str, Any]) -> None:
    torch.manual_seed(0)
    steps, losses = bench["pretraining"](bench["Setting"](True, "cpu", 1, "32"))
    assert losses["ours"] == pytest.approx(losses["transformers"], rel=1e-4)
    for name, (flops, step) in steps.items():
        if "transformers" not in name:
            assert flops == pytest.approx(_counted(step), rel=0.01), name


def test_distillation_arithmetic_and_losses(
    bench: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmdistill.distill.module.MAX_TOKENS_FOR_THREADING", 0)  # no threads
    torch.manual_seed(0)
    steps, losses = bench["distillation"](bench["Setting"](True, "cpu", 1, "32"), tmp_path)
    assert losses["cached"] == pytest.approx(losses["uncached"], rel=1e-5)
    for name, (flops, step) in steps.items():
        assert flops == pytest.approx(_counted(step), rel=0.05), name  # the transfer head is left out
    assert steps["distill, teacher_cache"][0] < 0.6 * steps["distill"][0]


def test_targets_are_ratios(bench: dict[str, Any]) -> None:
    row = {"seconds": 2.0, "gflop_per_s": 5.0}
    names = ["matrix products", "pretrain, transformers", "pretrain, full decoder", "pretrain, decoder_mask_ratio=0.5"]
    found = {name: dict(row) for name in [*names, "distill", "distill, teacher_cache"]}
    found["pretrain, full decoder"]["seconds"] = 1.0
    assert [value for _, value, _, _ in bench["targets"](found)] == [0.5, 1.0, 1.0, 1.0]
