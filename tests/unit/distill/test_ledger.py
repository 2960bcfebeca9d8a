"""The ledger of the teachers: formulas written out, and a whole training on tiny data."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill.checkpoint import load_torch
from mmdistill.distill import distill
from mmdistill.distill.ledger import (
    ClipFeatures,
    gradient_shares,
    held_out_losses,
    is_constant,
    ledger_lines,
    mean_variance,
    r_squared,
    target_settings,
)
from mmdistill.distill.module import TargetOptions
from tests.configs import distill_config
from tests.tiny_data import make_tiny, overrides, write_teacher
from tests.unit.distill.test_module import _module

MODALITIES = ("rgb", "flow", "skeleton")


def test_r_squared_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    y, p = rng.normal(size=(6, 3)), rng.normal(size=(6, 3))
    labels = ["a", "b", "a", "", "b", "b"]
    overall, by_class = r_squared(torch.tensor(y), torch.tensor(p), labels)
    mean = y.mean(axis=0)
    assert overall == pytest.approx(1 - ((y - p) ** 2).sum() / ((y - mean) ** 2).sum())
    rows = [1, 4, 5]
    assert by_class["b"] == pytest.approx(1 - ((y[rows] - p[rows]) ** 2).sum() / ((y[rows] - mean) ** 2).sum())
    assert list(by_class) == ["a", "b"]


def test_r_squared_of_perfect_constant_and_invalid_predictions() -> None:
    y = torch.arange(12.0).reshape(4, 3)
    assert r_squared(y, y, ["a"] * 4) == (1.0, {"a": 1.0})
    assert r_squared(y, y.mean(dim=0).expand_as(y), [""] * 4) == (0.0, {})
    assert r_squared(torch.ones(4, 3), y, ["a"] * 4) == (None, {"a": None})
    assert r_squared(y, y * torch.nan, [""] * 4) == (None, {})


def test_share_of_the_gradient_is_that_of_the_formula() -> None:
    """The gradient of w * mean((h(f) - y)²) is 2 w / (N D) * (h(f) - y) @ J, for a head h that is linear."""
    net = _module(targets=TargetOptions(weights={"flow": 3.0}))
    student = torch.randn(5, 16)
    targets = {m: torch.randn(5, 16) for m in MODALITIES}
    weights = {"rgb": 1.0, "flow": 3.0, "skeleton": 1.0}
    norms = {}
    for name in MODALITIES:
        head = net.cmt.get_submodule(f"mlp_to_{name}")
        head[1] = torch.nn.Identity()  # instead of GELU
        jacobian = (head[2].weight @ head[0].weight).detach().numpy()
        error = (head(student) - targets[name]).detach().numpy()
        norms[name] = np.linalg.norm(2 * weights[name] / error.size * error @ jacobian)
    found = gradient_shares(net, ClipFeatures(student, targets))
    for name in MODALITIES:
        assert found[name] == pytest.approx(norms[name] / sum(norms.values()), rel=1e-5)
    assert all(p.grad is None for p in net.parameters())


def test_held_out_losses_are_those_of_the_formulas() -> None:
    """Sum over teachers of w * mean((h(f) - y)²), and of w * mean((mean(y) - y)²)."""
    net = _module(targets=TargetOptions(weights={"flow": 3.0}))
    features = ClipFeatures(torch.randn(5, 16), {m: torch.randn(5, 16) for m in MODALITIES})
    loss = baseline = 0.0
    for name, weight in (("rgb", 1.0), ("flow", 3.0), ("skeleton", 1.0)):
        y = features.teachers[name].numpy()
        prediction = net.cmt(features.student)[name].detach().numpy()
        loss += weight * ((prediction - y) ** 2).mean()
        baseline += weight * ((y - y.mean(axis=0)) ** 2).mean()
    assert held_out_losses(net, features) == pytest.approx((loss, baseline), rel=1e-5)


def test_constant_features_are_recognized() -> None:
    features = torch.full((5, 4), 0.3)
    assert is_constant(features)
    features[2] = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))
    assert is_constant(features)
    features[1, 1] = 0.301
    assert not is_constant(features)
    assert not is_constant(features[:1])  # unknown


def _run(root: Path, *more: str) -> tuple[dict[str, Any], str, list[dict[str, str]]]:
    """Ledger in the last checkpoint, log, and rows of metrics.csv of a training of two epochs."""
    paths = [write_teacher(root / m, m, i) for i, m in enumerate(MODALITIES)]
    config = distill_config(
        *overrides(root / "data"), f"trainer.ckpt_path=[{','.join(map(str, paths))}]", "accelerator=cpu", *more
    )
    last = distill(config, root / "run")
    with (root / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return load_torch(last)["mmdistill"].get("ledger"), (root / "run" / "run.log").read_text(), rows


def test_training_ends_with_a_ledger(tmp_path: Path) -> None:
    make_tiny(tmp_path / "data", per_class=2)
    ledger, log, rows = _run(tmp_path, "trainer.standardize_targets=true")
    settings = "trainer.standardize_targets=standard"
    assert ledger["settings"] == [settings]
    assert f", precision 32, {settings}\n" in log
    assert (ledger["epoch"], ledger["train_clips"], ledger["held_out_clips"], ledger["problems"]) == (1, 8, 8, {})
    assert set(ledger["teachers"]) == set(MODALITIES)
    for name, values in ledger["teachers"].items():
        assert values["variance"] > 0
        assert not values["is_constant"]
        assert len(values["r2_by_class"]) == 4
        assert f"{name}: variance" in log
        assert float(rows[-1][f"r2_{name}"]) == pytest.approx(values["r2"])
        assert rows[0][f"gradient_share_{name}"] == ""  # only the last epoch has a ledger
    assert len(rows) == 2
    student = ledger["monitoring"]
    assert student.keys() == {"held_out_loss", "held_out_constant_baseline_loss", "feature_std", "effective_rank"}
    for name, value in student.items():
        assert float(rows[-1][name]) == pytest.approx(value)
        assert rows[0][name] == ""
    assert f"  student: held-out loss {student['held_out_loss']:.4f} (constant baseline" in log
    assert sum(values["gradient_share"] for values in ledger["teachers"].values()) == pytest.approx(1)
    json.dumps(ledger)


def test_validation_changes_no_weight(tmp_path: Path) -> None:
    """Also if there are no labels for the few-shot score, which is one line."""
    make_tiny(tmp_path / "data", per_class=2)
    _run(tmp_path)
    (plain,) = (tmp_path / "run" / "checkpoints").glob("epoch=01-*")
    expected = load_torch(plain)["state_dict"]
    shutil.move(tmp_path / "run", tmp_path / "plain")
    for more in ("data_module.n_way=2", "data_module.n_way=7"):
        small = ["data_module.q_sample=1", "data_module.k_shot=1", "trainer.val_episodes=2"]
        _, log, rows = _run(tmp_path, "trainer.check_val_every_n_epoch=1", *small, more)
        (path,) = (tmp_path / "run" / "checkpoints").glob("epoch=01-*")
        found = load_torch(path)["state_dict"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], x) for name, x in expected.items())
        assert all(float(row["held_out_loss"]) > 0 for row in rows)
        assert ("no val_top1_action: " in log) == ("val_top1_action" not in rows[0]) == (more[-1] == "7")
        shutil.rmtree(tmp_path / "run")


def test_teacher_without_held_out_files_has_no_r_squared(tmp_path: Path) -> None:
    """The evaluation reads rgb only, so its clips may lack other files; a ledger never ends a training."""
    make_tiny(tmp_path / "data", per_class=2)
    rallies = json.loads((tmp_path / "data" / "val.json").read_text())
    shutil.copytree(tmp_path / "data" / "frames" / rallies[0]["video"], tmp_path / "data" / "frames" / "new")
    (tmp_path / "data" / "held_out.json").write_text(json.dumps([*rallies[1:], {**rallies[0], "video": "new"}]))
    ledger, log, _ = _run(
        tmp_path, "data_module.val_json_path=held_out.json", "trainer.epochs=1", "trainer.standardize_targets=phi_s"
    )
    assert ledger["teachers"]["rgb"]["r2"] is not None
    assert ledger["teachers"]["flow"]["r2"] is None
    assert ledger["monitoring"].keys() == {"feature_std", "effective_rank"}  # a sum needs all teachers
    assert "R2 of flow is unknown: 1 of 8 held-out clips lack flow files" in log


def test_no_held_out_file(tmp_path: Path) -> None:
    make_tiny(tmp_path / "data", per_class=2)
    (tmp_path / "data" / "val.json").unlink()
    ledger, log, _ = _run(tmp_path, "trainer.epochs=1")
    assert "R2 of all teachers is unknown" in log
    assert ledger["teachers"]["flow"]["variance"] > 0


def test_constant_teacher_is_reported() -> None:
    """Its loss has a gradient until the head predicts the constant."""
    values = {"variance": 0.0, "is_constant": True, "gradient_share": 0.097, "r2": None, "r2_by_class": {}}
    ledger = {"epoch": 3, "train_clips": 9, "held_out_clips": 1, "held_out": "val.json", "problems": {}}
    lines = ledger_lines({**ledger, "teachers": {"flow": values}})
    assert lines[1] == "  flow: variance 0, gradient 9.7 %, R2 unknown"
    assert lines[2].startswith("teacher flow: its features are constant, so nothing can be learned from them, although")
    assert lines[2].endswith("or change its entry in trainer.ckpt_path")


def test_settings_that_differ_from_the_default() -> None:
    assert target_settings(distill_config()) == []
    changes = ["trainer.teacher_weights={flow: 2}", "trainer.standardize_targets=true", "pooling=last_k"]
    assert target_settings(distill_config(*changes)) == [
        "trainer.teacher_weights={flow:2}",
        "trainer.standardize_targets=standard",
        "pooling=last_k",
        "pooling_last_k=4",
    ]


def test_variance_is_the_mean_over_dimensions() -> None:
    features = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert mean_variance(features) == pytest.approx(0.5)
    assert mean_variance(features * torch.nan) is None
    assert mean_variance(features[:1]) is None
