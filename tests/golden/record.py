"""Record the loss of each of 20 steps of a tiny pretraining per modality and of a tiny distillation: float32, CPU.

    python -m tests.golden.record FOLDER    # writes FOLDER/pretrain.json and FOLDER/distill.json

The files in tests/golden were recorded with commit ae7d5c0, before modules and config keys were renamed:

    PYTHONPATH=CHECKOUT_OF_ae7d5c0/src OMP_NUM_THREADS=1 python -m tests.golden.record tests/golden

`tests/integration/test_golden_losses.py` compares the current code with them. Record them again only for a change
that is meant to change the numbers, and state the reason in the commit.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.tiny_data import MODEL, make_tiny, overrides

MODALITIES = ("rgb", "flow", "skeleton")
NUM_STEPS = 20
COMMON = [
    "batch_size=7",  # 10 batches of the 72 clips
    "trainer.epochs=2",
    "trainer.lr=0.1",
    "trainer.min_lr=0",
    "trainer.warmup_lr=0",
    "trainer.weight_decay=0.05",
    "trainer.clip_grad=1",
    "accelerator=cpu",
    "precision=32",
    "seed=0",
    "logger=csv",
]


def _modules() -> tuple[Any, Any, Any, Any]:
    """The pretraining's and the distillation's module, the class whose `losses` is recorded, and `load_config`."""
    try:
        from mmdistill.config.compose import load_config
        from mmdistill.distill import trainer as distillation
        from mmdistill.pretrain import trainer as pretraining

        return pretraining, distillation, pretraining.PretrainTrainer, load_config
    except ModuleNotFoundError:  # commit ae7d5c0
        from mmdistill.cli import load_config
        from mmdistill.distill import run as distillation
        from mmdistill.pretrain import loop as pretraining

        return pretraining, distillation, pretraining._Run, load_config


def record(root: Path) -> dict[str, dict[str, list[float]]]:
    """Train below the directory `root`.

    Returns:
        ``{"pretrain": {modality: losses}, "distill": {"loss": losses, modality: losses}}``, one loss per step.
    """
    from mmdistill.config import DistillConfig, PretrainConfig
    from mmdistill.distill.module import MMDistill

    pretraining, distillation, trainer_class, load_config = _modules()
    data = overrides(make_tiny(root / "data"))
    if load_config.__module__ == "mmdistill.cli":  # commit ae7d5c0 does not have this key
        data.remove("data_module.modalities.flow.compensate=null")
    pretrain_losses: dict[str, list[float]] = {m: [] for m in MODALITIES}
    distill_losses: dict[str, list[float]] = {name: [] for name in ("loss", *MODALITIES)}
    modality, original_pretrain, original_distill = "", trainer_class.losses, MMDistill.losses

    def record_pretrain(self: Any, batch: Any) -> Any:
        losses = original_pretrain(self, batch)
        pretrain_losses[modality].append(float(losses[0].detach()))
        return losses

    def record_distill(self: Any, batch: Any) -> Any:
        losses = original_distill(self, batch)
        for name, (loss, _) in losses.items():
            distill_losses[name].append(float(loss.detach()))
        distill_losses["loss"].append(sum(distill_losses[name][-1] for name in MODALITIES))
        return losses

    trainer_class.losses, MMDistill.losses = record_pretrain, record_distill  # type: ignore[method-assign]
    try:
        teachers = []
        for modality in MODALITIES:
            given = [f"modality={modality}", *data, *MODEL, *COMMON]
            config = load_config(PretrainConfig, "config_pretrain", given)
            teachers.append(f"{modality}:{pretraining.pretrain(config, root / modality)}")
        given = [*data, *COMMON, "test=False", f"trainer.ckpt_path={{{','.join(teachers)}}}"]
        distillation.distill(load_config(DistillConfig, "config_mmdistill", given), root / "distill")
    finally:
        trainer_class.losses, MMDistill.losses = original_pretrain, original_distill  # type: ignore[method-assign]
    assert {len(x) for x in (*pretrain_losses.values(), *distill_losses.values())} == {NUM_STEPS}
    return {"pretrain": pretrain_losses, "distill": distill_losses}


def main(folder: Path) -> None:
    """Write both files."""
    with tempfile.TemporaryDirectory() as root:
        for name, losses in record(Path(root)).items():
            (folder / f"{name}.json").write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
