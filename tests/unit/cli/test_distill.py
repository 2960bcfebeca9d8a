"""``mmdistill distill`` and ``lit_main_mmdistill.py``."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import mmdistill.distill
import mmdistill.evaluation.run
from mmdistill.cli import distill
from mmdistill.config import DistillConfig
from mmdistill.config.compose import load_config


def test_a_key_without_equal_sign_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        distill.main(["seed", "1"])
    assert capsys.readouterr().err == "mmdistill distill: error: seed 1: write seed=1\n"


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
        (True, True, None, ["paths", "check", "distill", "evaluate new.ckpt"]),
        (True, False, None, ["paths", "distill"]),
        (False, True, "old.ckpt", ["evaluate old.ckpt"]),
        (False, False, None, []),
    ],
)
def test_train_and_test_select_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, train: bool, test: bool, path: str | None, expected: list[str]
) -> None:
    steps: list[str] = []
    (tmp_path / ".hydra").mkdir()
    task = ["trainer.epochs=3", "resume=auto", "experiment=teachers", "data_module.k_shot=[1,5]"]
    hydra = {
        "runtime": {"config_sources": [], "choices": {"dataset": "tennis"}},
        "job": {"config_name": "config_mmdistill_tennis"},
        "overrides": {"task": task},
    }
    (tmp_path / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"data_module": {}}))

    def fake_distill(config: DistillConfig, run_dir: Path) -> Path:
        steps.append("distill")
        return Path("new.ckpt")

    def fake_evaluate(config: DistillConfig, checkpoint: str, run_dir: Path, *, stop_hint: str = "") -> None:
        steps.append(f"evaluate {checkpoint}")
        # a second training would be rejected, because the run folder contains a complete one
        command = (
            "mmdistill evaluate --config-name=config_mmdistill_tennis dataset=tennis experiment=teachers "
            "'data_module.k_shot=[1,5]' ckpt_path=new.ckpt"
        )
        assert stop_hint == (f"the training is complete; evaluate it with\n{command}" if train else "")

    monkeypatch.setattr(mmdistill.distill, "distill", fake_distill)
    monkeypatch.setattr(mmdistill.distill.teachers, "check_paths", lambda config: steps.append("paths"))
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
