import importlib.util
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.fewshot.features import load_features
from mmdistill.models.videomae import Encoder, EncoderGeometry
from tests.tiny_data import make_tiny, overrides

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start_process` sets these where they are missing; the other tests must not see them."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in {**world, "DS_ACCELERATOR": "cpu", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)


def run(monkeypatch: pytest.MonkeyPatch, script: str, *args: object) -> int:
    """The script's main in this process: starting another one costs seconds of imports."""
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / "scripts" / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *map(str, args)])
    return int(module.main())


def test_features_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    labels = np.repeat(np.arange(6), 20)
    x = np.eye(6)[labels]
    np.savez(tmp_path / "perfect.npz", features=x, labels=labels, groups=np.arange(120) // 2)
    np.savez(tmp_path / "noise.npz", features=np.random.default_rng(0).normal(size=x.shape), labels=labels)
    out = tmp_path / "new" / "out.json"
    files = [tmp_path / "perfect.npz", tmp_path / "noise.npz"]
    options = ["--k-shot", 1, 2, "--q-sample", 5, "--episodes", 30, "--head", "centroid", "logistic", "--workers", 1]
    wanted = ["--json", out, "--report", tmp_path / "report", "--disjoint", "video"]
    assert run(monkeypatch, "evaluate_features.py", *files, *options, *wanted) == 0
    found, shown = json.loads(out.read_text()), capsys.readouterr()
    assert found["top1_action_ensemble"] == 1.0
    assert found["network"] == "perfect"
    assert len(found["settings"]) == 4
    assert found["settings"][0]["differences"]["perfect - noise"]["low"] > 0.5
    assert "6 classes to draw from" in shown.err
    assert "100.00 ± 0.00" in shown.out
    assert (tmp_path / "report" / "report.html").is_file()


def test_too_few_classes_end_with_one_line_and_status_2(tmp_path: Path):
    labels = np.repeat(np.arange(6), 20)
    np.savez(tmp_path / "f.npz", features=np.eye(6)[labels], labels=labels)
    command = [sys.executable, str(ROOT / "scripts" / "evaluate_features.py"), str(tmp_path / "f.npz"), "--n-way", "7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert "need 7 classes" in done.stderr
    assert "Traceback" not in done.stderr


def test_extract_reads_a_checkpoint_and_the_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    data = make_tiny(tmp_path / "data", per_class=2)
    parts = {}
    for seed, (part, channels) in enumerate((("student_rgb", 3), ("teacher_flow", 2))):
        torch.manual_seed(seed)
        geometry = EncoderGeometry(channels, 4, 32, 32, 8, 2, dim=64, depth=1, heads=1, head_dim=64, mlp_dim=64)
        parts |= {f"{part}.encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
    torch.save({"state_dict": parts}, tmp_path / "a=b.ckpt")
    options = [o for o in overrides(data) if not o.startswith("trainer")]
    extract = partial(run, monkeypatch, "extract_features.py")
    wanted = ["--part", "teacher_flow", "--n-masks", 2]
    assert extract(tmp_path / "a=b.ckpt", tmp_path / "flow.npz", *wanted, *options) == 0
    flow = load_features(tmp_path / "flow.npz")
    assert flow.features.shape == (8, 2, 64)
    assert flow.network == "teacher_flow"
    assert flow.readout == "2 tube masks, 75% removed, shared"
    assert len(flow.classes) == 4
    assert flow.groups[0] == "rally_CC_0"
    parts["student_rgb.encoder.norm.weight"].fill_(float("nan"))
    torch.save({"state_dict": parts}, tmp_path / "nan.ckpt")
    assert extract(tmp_path / "nan.ckpt", tmp_path / "nan.safetensors", *options) == 2
    assert "student_rgb: NaN or infinite features of 8 of 8 clips" in capsys.readouterr().err
    assert not (tmp_path / "nan.safetensors").exists()
    assert extract(tmp_path / "a=b.ckpt", "x.npz", "data_module.n_wya=3", *options) == 2
    assert "n_wya" in capsys.readouterr().err
    assert extract(tmp_path / "a=b.ckpt", tmp_path / "x.npz", *options, "data_module.num_frames=8") == 0
