"""``run.json``: one record per start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmdistill.training.run_metadata import git_state, record_run, update_record


def test_each_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/pretrain_main.py", "modality=rgb"])
    for _ in range(2):
        record_run(tmp_path, {"seed": 3}, processes=2, accelerator="cpu")
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert first["command"] == ["pretrain_main.py", "modality=rgb"]
    assert second["config"] == {"seed": 3}
    assert (first["environment"]["device"], first["environment"]["processes"]) == ("cpu", 2)
    assert {"torch", "deepspeed", "hydra-core"} <= set(first["environment"]["packages"])


def test_values_are_added_to_the_record_of_this_start(tmp_path: Path) -> None:
    update_record(tmp_path, {"flops_per_step": 1})
    assert not list(tmp_path.iterdir())  # a training that another program calls has no record
    for seed in (3, 4):
        record_run(tmp_path, {"seed": seed}, processes=1, accelerator="cpu")
    update_record(tmp_path, {"flops_per_step": 5})
    first, second = json.loads((tmp_path / "run.json").read_text())
    assert "flops_per_step" not in first
    assert (second["flops_per_step"], second["config"]) == (5, {"seed": 4})


def test_git_state_lists_changed_files(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        own = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *own, *words], check=True, capture_output=True)

    assert git_state(tmp_path / "absent") is None
    assert git_state(None) is None
    git("init")
    (tmp_path / "a.txt").write_text("1")
    git("add", "a.txt")
    git("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean is not None
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    (tmp_path / "a.txt").write_text("2")
    state = git_state(tmp_path)
    assert state is not None
    assert (state["dirty"], state["changed"]) == (True, ["a.txt"])
