"""``mmdistill distill`` and ``lit_main_mmdistill.py``."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import mmdistill.distill
import mmdistill.evaluation.run
from mmdistill.cli import distill
from mmdistill.config import DistillConfig
from mmdistill.config.compose import load_config


def test_main_passes_the_config_and_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(distill, "run_entrypoint", lambda *args, **options: calls.append({"args": args, **options}))
    assert distill.main(["train=False"]) == 0
    assert calls[0]["args"] == (distill.run_distillation, DistillConfig)
    assert (calls[0]["config_name"], calls[0]["verb"], calls[0]["argv"]) == (
        "config_mmdistill",
        "distill",
        ["train=False"],
    )


@pytest.mark.parametrize(
    ("train", "test", "path", "expected"),
    [
        (True, True, None, ["check", "distill", "evaluate new.ckpt"]),
        (True, False, None, ["distill"]),
        (False, True, "old.ckpt", ["evaluate old.ckpt"]),
        (False, False, None, []),
    ],
)
def test_train_and_test_select_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, train: bool, test: bool, path: str | None, expected: list[str]
) -> None:
    steps: list[str] = []

    def fake_distill(config: DistillConfig, run_dir: Path) -> Path:
        steps.append("distill")
        return Path("new.ckpt")

    def fake_evaluate(config: DistillConfig, checkpoint: str, run_dir: Path, *, stop_hint: str = "") -> None:
        steps.append(f"evaluate {checkpoint}")
        # a second training would be rejected, because the run folder contains a complete one
        assert stop_hint == (
            "the training is complete; evaluate it with\n"
            f"mmdistill evaluate ckpt_path=new.ckpt hydra.run.dir={tmp_path}"
            if train
            else ""
        )

    monkeypatch.setattr(mmdistill.distill, "distill", fake_distill)
    monkeypatch.setattr(mmdistill.evaluation.run, "check_evaluation", lambda config: steps.append("check"))
    monkeypatch.setattr(mmdistill.evaluation.run, "evaluate_checkpoint", fake_evaluate)
    overrides = [
        f"train={train}",
        f"test={test}",
        "trainer.ckpt_path=[a,b,c]",
        *([f"ckpt_path={path}"] if path else []),
    ]
    distill.run_distillation(load_config(DistillConfig, "config_mmdistill", overrides), str(tmp_path))
    assert steps == expected


def test_evaluation_command_has_the_settings_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    task = [
        "experiment=teachers",
        "train=True",
        "dataset=tennis",
        "trainer.epochs=3",
        "trainer=mine",
        "resume=auto",
        "data_module.k_shot=[1,5]",
    ]
    sources = [
        SimpleNamespace(provider="main", path="/configs"),
        SimpleNamespace(provider="command-line", path="/mine"),
    ]
    hydra_config = SimpleNamespace(
        runtime=SimpleNamespace(config_sources=sources),
        job=SimpleNamespace(config_name="config_mmdistill_tennis"),
        overrides=SimpleNamespace(task=task),
    )
    holder = SimpleNamespace(initialized=lambda: True, get=lambda: hydra_config)
    monkeypatch.setattr(distill, "HydraConfig", holder)
    assert distill.evaluation_command("runs/a/checkpoints/last.ckpt", "runs/a") == (
        "mmdistill evaluate --config-dir=/mine --config-name=config_mmdistill_tennis dataset=tennis "
        "'data_module.k_shot=[1,5]' ckpt_path=runs/a/checkpoints/last.ckpt hydra.run.dir=runs/a"
    )
