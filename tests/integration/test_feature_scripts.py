import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.fewshot.features import load_features
from mmdistill.models.videomae import Encoder, EncoderConfig
from tests.commands import Script
from tests.tiny_data import make_tiny, overrides


@pytest.fixture(autouse=True)
def set_single_process_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start_process` sets these where they are missing; the other tests must not see them."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in {**world, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)


def test_features_of_another_model_are_evaluated(tmp_path: Path, script: Script):
    labels = np.repeat(np.arange(6), 20)
    x = np.eye(6)[labels]
    np.savez(tmp_path / "perfect.npz", features=x, labels=labels, groups=np.arange(120) // 2)
    np.savez(tmp_path / "noise.npz", features=np.random.default_rng(0).normal(size=x.shape), labels=labels)
    out = tmp_path / "new" / "out.json"
    files = [tmp_path / "perfect.npz", tmp_path / "noise.npz"]
    options = [
        "--k-shot",
        1,
        2,
        "--q-sample",
        5,
        "--episodes",
        30,
        "--classifier",
        "centroid",
        "logistic",
        "--workers",
        1,
    ]
    wanted = ["--json", out, "--report", tmp_path / "report", "--disjoint", "video"]
    done = script("evaluate_features.py", *files, *options, *wanted)
    assert done.returncode == 0
    found = json.loads(out.read_text())
    assert found["top1_action_ensemble"] == 1.0
    assert found["network"] == "perfect"
    assert len(found["settings"]) == 4
    assert found["settings"][0]["differences"]["perfect - noise"]["low"] > 0.5
    assert "6 eligible classes" in done.stderr
    assert "100.00 ± 0.00" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()


def test_too_few_classes_exit_with_one_line_and_status_2(tmp_path: Path, script: Script):
    labels = np.repeat(np.arange(6), 20)
    np.savez(tmp_path / "f.npz", features=np.eye(6)[labels], labels=labels)
    done = script("evaluate_features.py", tmp_path / "f.npz", "--n-way", 7)
    assert done.returncode == 2
    assert "need 7 classes" in done.stderr
    assert done.stderr.count("\n") == 1


def test_features_of_a_checkpoint_are_extracted(tmp_path: Path, script: Script):
    data = make_tiny(tmp_path / "data", per_class=2)
    parts = {}
    for seed, (part, channels) in enumerate((("student_rgb", 3), ("teacher_flow", 2))):
        torch.manual_seed(seed)
        geometry = EncoderConfig(channels, 4, 32, 32, 8, 2, dim=64, depth=1, heads=1, head_dim=64, mlp_dim=64)
        parts |= {f"{part}.encoder.{k}": v for k, v in Encoder(geometry).state_dict().items()}
    torch.save({"state_dict": parts}, tmp_path / "a=b.ckpt")
    options = [o for o in overrides(data) if not o.startswith("trainer")]
    extract = partial(script, "extract_features.py")
    wanted = ["--component", "teacher_flow", "--n-masks", 2]
    assert extract(tmp_path / "a=b.ckpt", tmp_path / "flow.npz", *wanted, *options).returncode == 0
    flow = load_features(tmp_path / "flow.npz")
    assert flow.features.shape == (8, 2, 64)
    assert flow.network == "teacher_flow"
    assert flow.input_mode == "2 tube masks, 75% removed, shared"
    assert len(flow.classes) == 4
    assert flow.groups[0] == "rally_CC_0"
    parts["student_rgb.encoder.norm.weight"].fill_(float("nan"))
    torch.save({"state_dict": parts}, tmp_path / "nan.ckpt")
    done = extract(tmp_path / "nan.ckpt", tmp_path / "nan.safetensors", *options)
    assert done.returncode == 2
    assert "student_rgb: NaN or infinite features of 8 of 8 clips" in done.stderr
    assert not (tmp_path / "nan.safetensors").exists()
    done = extract(tmp_path / "a=b.ckpt", "x.npz", "data_module.n_wya=3", *options)
    assert done.returncode == 2
    assert "n_wya" in done.stderr
    assert extract(tmp_path / "a=b.ckpt", tmp_path / "x.npz", *options, "data_module.num_frames=8").returncode == 0
