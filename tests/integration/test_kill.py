"""Short versions of benchmarks/kill.py and benchmarks/endurance.py."""

import json
from pathlib import Path

from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from tests.commands import run_python


def test_killed_training_is_completed_exactly(tmp_path: Path) -> None:
    options = ["--training", "pretrain", "--epochs", "2", "--folder", tmp_path, "--kills", "2"]
    assert ", 0 failures" in run_python("benchmarks/kill.py", *options, "--kinds", "save", "worker").stdout


def test_endurance_samples_the_process_and_its_worker(tmp_path: Path) -> None:
    result_path = tmp_path / "result.json"
    limits = ["--max-mb-per-hour", "inf", "--max-files", "100", "--max-threads", "100"]
    run_python("benchmarks/endurance.py", "--training", "pretrain", "--minutes", "0.01", *limits, "--json", result_path)
    result = json.loads(result_path.read_text())["pretrain"]
    assert result["status"] == INTERRUPTED_EXIT_CODE
    assert result["epochs"] >= 1
    assert result["processes"].keys() == {"main", "worker 0"}
