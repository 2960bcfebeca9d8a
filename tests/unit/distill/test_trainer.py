"""Which checkpoints are those of a complete distillation."""

from pathlib import Path
from typing import Any

import pytest

from mmdistill.checkpoint import save_torch
from mmdistill.distill.trainer import _is_complete


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
def test_complete_checkpoints(tmp_path: Path, meta: dict[str, Any], expected: bool) -> None:
    save_torch({"state_dict": {}, "mmdistill": meta}, tmp_path / "last.ckpt")
    assert _is_complete(tmp_path / "last.ckpt", epochs=2) is expected
