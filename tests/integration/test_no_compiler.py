"""Machines without a compiler, ninja, CUDA toolkit and home directory."""

from pathlib import Path

import pytest

from tests.commands import run_python
from tests.tiny_data import MODEL, make_tiny, overrides

BARE = {"PATH": "/nonexistent", "HOME": "/dev/null/home", "CUDA_HOME": "", "TORCH_EXTENSIONS_DIR": "/dev/null/build"}


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_3_offload"])
def test_deepspeed_compiles_nothing(strategy: str, tmp_path: Path) -> None:
    """Nobody waits for a compiler, and environments share no build folder."""
    data = overrides(make_tiny(tmp_path / "data", per_class=2))
    common = [
        "accelerator=cpu",
        "trainer.epochs=1",
        "batch_size=8",
        "num_workers=0",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    run = ["pretrain_main.py", "modality=flow", f"strategy={strategy}", *data, *MODEL, *common]
    done = run_python(*run, env=BARE)
    assert "last checkpoint" in done.stdout + done.stderr
