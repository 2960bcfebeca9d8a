"""Checkpoints of commit ae7d5c0, written inside an epoch before names in them were changed, still resume.

tests/golden/record_checkpoints.py wrote them, and the losses of the same trainings without an interruption.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmdistill.config import ConfigError, DistillConfig, PretrainConfig
from mmdistill.config.compose import load_config
from mmdistill.distill.module import MMDistill
from mmdistill.distill.trainer import distill
from mmdistill.pretrain.trainer import PretrainTrainer, pretrain
from tests.golden.record_checkpoints import DISTILL, PRETRAIN, STOP_AT
from tests.tiny_data import make_tiny, overrides

OLD = Path(__file__).resolve().parents[1] / "golden" / "ae7d5c0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data"))


def _rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _expected(name: str) -> Any:
    return pytest.approx(json.loads((OLD / "losses.json").read_text())[name], rel=1e-4)


def test_pretraining_resumes(data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    original = PretrainTrainer.losses

    def record(self: Any, batch: Any) -> Any:
        found = original(self, batch)
        losses.append(float(found[0].detach()))
        return found

    monkeypatch.setattr(PretrainTrainer, "losses", record)
    checkpoint = shutil.copytree(OLD / "pretrain", tmp_path / "old" / "checkpoints" / f"stopped-step={STOP_AT}")
    given = [*data, *PRETRAIN, f"resume='{checkpoint}'"]
    for changed, message in (
        ("batch_size=6", "global_batch 7 / 6"),
        ("model.pos_embed=sincos", "pos_embed sincos_separable / sincos"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(load_config(PretrainConfig, "config_pretrain", [*given, changed]), tmp_path / "other")
    pretrain(load_config(PretrainConfig, "config_pretrain", given), tmp_path / "run")
    assert losses == _expected("pretrain")
    (row,) = _rows(tmp_path / "run")
    assert (row["epoch"], row["step"]) == ("1", "20")
    # the epoch's means include the batches before the stop
    assert float(row["loss"]) != pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_distillation_resumes(data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    original = MMDistill.losses

    def record(self: Any, batch: Any) -> Any:
        found = original(self, batch)
        losses.append(float(found["rgb"][0].detach()))
        return found

    monkeypatch.setattr(MMDistill, "losses", record)
    given = [*data, *DISTILL, f"resume={OLD / 'last.ckpt'}"]
    with pytest.raises(ConfigError, match="global_batch 7 / 6"):
        distill(load_config(DistillConfig, "config_mmdistill", [*given, "batch_size=6"]), tmp_path / "other")
    distill(load_config(DistillConfig, "config_mmdistill", given), tmp_path / "run")
    assert losses == _expected("distill")
    (row,) = _rows(tmp_path / "run")
    assert (row["epoch"], row["step"]) == ("1", "20")
    assert float(row["constant_baseline_loss_rgb"]) > 0
    assert float(row["train_loss"]) != pytest.approx(sum(losses) / len(losses), rel=1e-4)
