"""Which checkpoints are those of a complete distillation; the log lines of Lightning; a trace."""

import csv
import json
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import load_torch
from mmdistill.distill.trainer import _is_complete, _is_no_noise, distill, hide_lightning_noise
from mmdistill.modalities import BUILTIN_MODALITIES
from tests.configs import distill_config
from tests.tiny_data import make_tiny, overrides, write_teacher


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"kind": "distill", "epoch": 1, "batch": None}, True),
        ({"kind": "distill", "epoch": 4, "batch": None}, True),  # trainer.epochs was larger
        ({"kind": "distill", "epoch": 0, "batch": None}, False),
        ({"kind": "distill", "epoch": 1, "batch": 3}, False),  # stopped inside the last epoch
        ({}, False),  # written by another program
    ],
)
def test_complete_checkpoints(meta: dict[str, Any], expected: bool) -> None:
    assert _is_complete(meta, epochs=2) is expected


def test_noise_of_lightning_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.INFO, logger.name):
        warnings.simplefilter("always")
        hide_lightning_noise()
        hide_lightning_noise()  # a sweep runs several trainings in one process
        for message in ("TPU available: False, using: 0 TPU cores", "💡 Tip: try", "Restored all states from"):
            logger.info(message)
        warnings.warn("Found 46 module(s) in eval mode at the start of training.", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
    assert logger.filters.count(_is_no_noise) == 1
    logger.removeFilter(_is_no_noise)
    assert caplog.messages == ["Restored all states from"]
    assert [str(warning.message) for warning in caught] == ["another warning"]


def test_trace_shows_the_parts_of_the_steps_and_changes_no_weight(tmp_path: Path) -> None:
    """12 clips in 2 epochs of 4 steps; the second epoch has cached teachers."""
    data = overrides(make_tiny(tmp_path / "data", per_class=1))
    paths = [write_teacher(tmp_path / name, name, seed) for seed, name in enumerate(BUILTIN_MODALITIES)]
    fixed = [f"trainer.ckpt_path=[{','.join(map(str, paths))}]", "trainer.cache_teacher_epochs=1", "accelerator=cpu"]
    fixed += ["batch_size=3", "test=False"]
    plain = distill(distill_config(*data, *fixed), tmp_path / "plain")
    traced = distill(distill_config(*data, *fixed, "trainer.profile=3"), tmp_path / "traced")
    weights, own_weights = (load_torch(path)["state_dict"] for path in (plain, traced))
    assert all(torch.equal(value, own_weights[name]) for name, value in weights.items())
    events = json.loads((tmp_path / "traced" / "trace-steps=4-6.json").read_bytes())["traceEvents"]
    ranges = Counter(event["name"] for event in events if event.get("cat") == "user_annotation")
    expected = dict.fromkeys(("wait for data", "transfer", "forward", "backward", "optimizer"), 3)
    # the loader of an epoch is asked once more at its end
    assert {name: min(ranges[name], 3) for name in expected} == expected
    with (tmp_path / "traced" / "metrics.csv").open(newline="") as file:
        gflop, cached_gflop = (float(row["gflop_per_step"]) for row in csv.DictReader(file))
    assert 0 < cached_gflop < gflop / 2
