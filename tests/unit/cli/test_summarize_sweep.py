"""``mmdistill sweep-summary``."""

import csv
import json
from pathlib import Path

import pytest

from mmdistill.cli.summarize_sweep import main
from tests.unit.workflows.sweep_jobs import write_job


def test_one_key_gives_a_line_and_failed_jobs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, ratio in enumerate((0.5, 0.75, 0.9)):
        write_job(tmp_path, i, ["modality=rgb", f"data_module.mask_ratio={ratio}"], loss=1 + ratio)
    write_job(tmp_path, 3, ["modality=rgb", "data_module.mask_ratio=0.95"])
    (tmp_path / "run_3" / "failed.json").write_text(json.dumps({"error": "no memory\nsecond line", "traceback": ""}))
    assert main([str(tmp_path)]) == 0
    assert "no result: run_3 (data_module.mask_ratio=0.95): no memory\n" in capsys.readouterr().out
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["job", "data_module.mask_ratio"]
    assert [(r["data_module.mask_ratio"], r["loss"], r["error"]) for r in rows[1:]] == [
        ("0.75", "1.75", ""), ("0.9", "1.9", ""), ("0.95", "", "no memory"),
    ]  # fmt: skip
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_seeds_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, (ratio, seed) in enumerate([(0.5, 0), (0.5, 1), (0.75, 0), (0.75, 1)]):
        write_job(tmp_path, i, [f"data_module.mask_ratio={ratio}", f"seed={seed}"], shots={1: ratio + 0.2 * seed})
    assert main([str(tmp_path)]) == 0
    assert "0.6000 ± 0.1000" in capsys.readouterr().out


def test_unfinished_job_and_empty_folder_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "contains no job" in capsys.readouterr().err
    write_job(tmp_path, 0, ["seed=1"])
    assert main([str(tmp_path)]) == 0
    assert "unfinished" in capsys.readouterr().out
