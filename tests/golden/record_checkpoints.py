"""Record checkpoints of commit ae7d5c0 that were written inside an epoch, and the losses of the rest of the training.

    PYTHONPATH=CHECKOUT_OF_ae7d5c0/src OMP_NUM_THREADS=1 python -m tests.golden.record_checkpoints tests/golden/ae7d5c0

`tests/integration/test_old_checkpoints.py` resumes them. This module runs with the code of that commit only.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from tests.tiny_data import make_tiny, overrides

STOP_AT = 13  # of 20 steps, 10 per epoch
MODEL = ["model.dim=16", "model.depth=1", "model.heads=2", "model.decoder_dim=16", "model.decoder_depth=1",
         "model.decoder_heads=1"]  # fmt: skip
COMMON = ["batch_size=7", "trainer.epochs=2", "trainer.lr=0.1", "trainer.min_lr=0", "trainer.warmup_lr=0",
          "trainer.weight_decay=0.05", "trainer.clip_grad=1", "accelerator=cpu", "precision=32", "seed=0",
          "logger=csv"]  # fmt: skip
PRETRAIN = ["modality=skeleton", *MODEL, *COMMON]
DISTILL = [*COMMON, "test=False", "trainer.teachers=[rgb]"]  # and trainer.ckpt_path, which a resume does not need


def main(out: Path) -> None:
    """Write ``pretrain/``, ``last.ckpt`` and ``losses.json`` to `out`."""
    from mmdistill.cli import load_config
    from mmdistill.config import DistillConfig, PretrainConfig
    from mmdistill.distill import run
    from mmdistill.distill.module import MMDistill
    from mmdistill.pretrain import loop

    losses: list[float] = []
    stop_at = 0

    def recorded(original: Any, first: Any) -> Any:
        def wrapper(self: Any, batch: Any) -> Any:
            found = original(self, batch)
            losses.append(float(first(found)))
            if len(losses) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        return wrapper

    loop._Run.losses = recorded(loop._Run.losses, lambda pair: pair[0].detach())
    MMDistill.losses = recorded(MMDistill.losses, lambda found: found["rgb"][0].detach())

    def train(job: Any, config: Any, run_dir: Path, stop: int) -> list[float]:
        nonlocal stop_at
        stop_at = stop
        losses.clear()
        try:
            job(config, run_dir)
        except SystemExit:
            assert len(losses) == stop
        return list(losses)

    out.mkdir(parents=True, exist_ok=True)
    root = Path("/tmp/mmdistill_golden")  # appears in the files
    shutil.rmtree(root, ignore_errors=True)
    data = overrides(make_tiny(root / "data"))
    teacher = loop.pretrain(
        load_config(PretrainConfig, "config_pretrain", [*data, *PRETRAIN, "modality=rgb"]), root / "teacher"
    )
    given = [*data, *DISTILL, f"trainer.ckpt_path=[{teacher}]"]
    jobs = {
        "pretrain": (loop.pretrain, load_config(PretrainConfig, "config_pretrain", [*data, *PRETRAIN])),
        "distill": (run.distill, load_config(DistillConfig, "config_mmdistill", given)),
    }
    rest = {}
    for name, (job, config) in jobs.items():
        rest[name] = train(job, config, root / f"{name}_whole", 0)[STOP_AT:]
        train(job, config, root / name, STOP_AT)
    (stopped,) = (root / "pretrain" / "checkpoints").glob("*-step=*")
    shutil.copytree(stopped, out / "pretrain", dirs_exist_ok=True)
    shutil.copy(root / "distill" / "checkpoints" / "last.ckpt", out / "last.ckpt")
    (out / "losses.json").write_text(json.dumps(rest, indent=1) + "\n")
    shutil.rmtree(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
