"""Rows of a sweep from the files of its jobs."""

import csv
import json
from pathlib import Path

import pytest

from mmdistill.errors import InputError
from mmdistill.workflows.sweep_results import last_metrics, objective, read_sweep, swept_keys, write_table
from tests.unit.workflows.sweep_jobs import write_job


def test_last_number_of_each_column_counts(tmp_path: Path) -> None:
    write_job(tmp_path, 0, [], loss=0.5)
    assert last_metrics(tmp_path / "run_0" / "metrics.csv") == {"step": 2, "loss": 0.5, "lr": 1}
    assert objective(tmp_path / "run_0") == 0.5
    with pytest.raises(ValueError, match=r"has no fewshot\.json and no loss"):
        objective(tmp_path)


def test_accuracy_is_the_objective_of_an_evaluation(tmp_path: Path) -> None:
    write_job(tmp_path, 0, [], loss=0.5, shots={1: 0.7})
    assert objective(tmp_path / "run_0") == 0.7


def test_several_shots_in_one_job_are_a_swept_key(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["data_module.k_shot=[1,5]"], shots={1: 0.3, 5: 0.6})
    rows = read_sweep(tmp_path)
    assert [(r.overrides["data_module.k_shot"], r.values["top1_action_ensemble"]) for r in rows] == [
        ("1", 0.3),
        ("5", 0.6),
    ]


def test_jobs_are_sorted_by_number_and_seeds_are_keys(tmp_path: Path) -> None:
    for number in (10, 2):
        write_job(tmp_path, number, ["modality=rgb", f"+seed={number}"], loss=1.0)
    rows = read_sweep(tmp_path)
    assert [r.job for r in rows] == ["run_2", "run_10"]
    assert swept_keys(rows) == ["seed"]


def test_failed_and_unfinished_jobs_have_an_error(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["seed=0"], loss=1.0)
    write_job(tmp_path, 1, ["seed=1"])
    write_job(tmp_path, 2, ["seed=2"])
    (tmp_path / "run_1" / "failed.json").write_text(json.dumps({"error": "no memory\nsecond line", "traceback": ""}))
    rows = read_sweep(tmp_path)
    assert [r.error.partition(":")[0] for r in rows] == ["", "no memory", "unfinished"]
    write_table(rows, tmp_path / "sweep.csv")
    with (tmp_path / "sweep.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["job", "seed", "step", "loss", "lr", "error"]
    assert [(r["seed"], r["loss"]) for r in table] == [("0", "1.0"), ("1", ""), ("2", "")]


def test_folder_without_jobs_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="contains no job"):
        read_sweep(tmp_path)


def test_single_runs_are_no_sweep(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["modality=rgb"], loss=1.0)
    (tmp_path / "run_0/.hydra/hydra.yaml").write_text("hydra: {mode: RUN}\n")
    with pytest.raises(InputError, match="contains 1 run without -m, and no sweep; give the folder that `-m` wrote"):
        read_sweep(tmp_path)
    write_job(tmp_path, 1, ["modality=flow"], loss=1.0)
    (tmp_path / "run_1/.hydra/hydra.yaml").write_text("hydra: {mode: MULTIRUN}\n")
    assert [row.job for row in read_sweep(tmp_path)] == ["run_1"]
