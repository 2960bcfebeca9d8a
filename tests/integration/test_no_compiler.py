"""Machines without a compiler, ninja, CUDA toolkit and home directory."""

from pathlib import Path

import pytest

from tests.commands import run_python
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides, write_teacher

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


def test_distillation_and_evaluation_do_not_import_deepspeed(tmp_path: Path) -> None:
    """Three steps with strategy=auto, then the evaluation."""
    data = overrides(make_tiny(tmp_path / "data", per_class=2))
    teachers = ",".join(str(write_teacher(tmp_path / m, m, 0)) for m in ("rgb", "flow", "skeleton"))
    protocol = [*EVAL, "data_module.n_way=2", "data_module.q_sample=1", "data_module.episodes=5", "baselines=[random]"]
    run = ["tests/integration/without_deepspeed.py", "lit_main_mmdistill.py", *data, *protocol, "accelerator=cpu"]
    own = ["trainer.epochs=1", f"trainer.ckpt_path=[{teachers}]", f"hydra.run.dir={tmp_path / 'run'}"]
    run_python(*run, *own, env=BARE)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "run" / "fewshot.json").is_file()


def test_deepspeed_is_imported_on_a_gpu_without_cuda_toolkit() -> None:
    """torch from pip brings no nvcc. DeepSpeed's check of its CUDA ops must not end the import."""
    done = run_python("tests/integration/import_deepspeed.py", env=BARE)
    assert done.stdout.split()[-1] == "cuda"
