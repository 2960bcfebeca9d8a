"""Folders of finished jobs, as a sweep leaves them."""

import json
from pathlib import Path


def write_job(
    root: Path, number: int, overrides: list[str], *, loss: float | None = None, shots: dict[int, float] | None = None
) -> None:
    """Write the folder ``run_NUMBER``: overrides, metrics.csv if `loss` is given, fewshot.json if `shots` is given.

    Args:
        root: folder of the sweep.
        number: number of the job.
        overrides: ``key=value``.
        loss: loss of the last epoch.
        shots: `k_shot` -> accuracy.
    """
    job = root / f"run_{number}"
    (job / ".hydra").mkdir(parents=True)
    (job / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in overrides))
    if loss is not None:
        (job / "metrics.csv").write_text(f"step,loss,lr\n1,9,1\n2,{loss},\n")
    if shots:
        settings = [
            {
                "n_way": 5,
                "k_shot": k,
                "classifier": "logistic",
                "rows": {"student_rgb": {"top1_action_ensemble": v, "ci95": 0.01}},
            }
            for k, v in shots.items()
        ]
        first = next(iter(shots.values()))
        report = {"network": "student_rgb", "top1_action_ensemble": first, "settings": settings}
        (job / "fewshot.json").write_text(json.dumps(report))
