"""The run log: progress lines, ``run.log``, metrics for all trackers."""

import csv
import errno
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.config import PretrainConfig, as_names
from mmdistill.config.compose import load_config
from mmdistill.files import WriteError
from mmdistill.training import run_logger
from mmdistill.training.loggers import ResumePoint, Tracker
from mmdistill.training.run_logger import RunLog, ThroughputMeter, baseline_ratio, peak_memory
from tests.disk_faults import failing_disk


def test_default_trackers_get_the_same_metrics(tmp_path: Path) -> None:
    names = as_names("logger", load_config(PretrainConfig, "config_pretrain", ["modality=rgb"]).logger)
    with RunLog(tmp_path, total_steps=2, title="t") as log:
        log.open_trackers(names, {})
        log.log_metrics(1, {"loss": 0.5})
        log.log_metrics(2, {"loss": 0.25, "loss_scale": 1024.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"step": "1", "loss": "0.5", "loss_scale": ""},
        {"step": "2", "loss": "0.25", "loss_scale": "1024.0"},
    ]


def test_run_resumed_in_another_folder_inherits_metrics(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "metrics.csv").write_text("step,loss\n10,0.9\n20,0.5\n30,0.7\n")
    resume = ResumePoint(old / "checkpoints" / "epoch=01-loss=0.5000", 20)
    with RunLog(new, total_steps=3, title="t") as log:
        log.open_trackers(["csv"], {}, resume)
        log.log_metrics(30, {"loss": 0.4, "top1": 0.3})
    assert (new / "metrics.csv").read_text().splitlines() == ["step,loss,top1", "10,0.9,", "20,0.5,", "30,0.4,0.3"]
    assert f"copied 2 rows of metrics.csv from {old}" in (new / "run.log").read_text()


def test_plain_lines_show_memory_and_remaining_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, total_steps=3, title="pretrain") as log:
        for done in (1, 2, 3):
            log.step(done, "7 clips/s")
    lines = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/3", "3/3"]  # the first and the last; between them too little time
    assert re.search(r"memory \d+\.\d GiB ETA \?$", lines[0])
    assert lines[1].endswith("ETA 0:00:00")
    assert (tmp_path / "run.log").read_text().count("7 clips/s") == 2


def test_full_disk_of_a_tracker_does_not_hide_the_error_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def close() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = Tracker(lambda *_: None, lambda *_: None, close, None)
    monkeypatch.setitem(run_logger.TRACKERS, "csv", lambda *_: tracker)

    def run(error: Exception | None) -> None:
        with RunLog(tmp_path, total_steps=1, title="t") as log:
            log.open_trackers(["csv"], {})
            if error:
                raise error

    with pytest.raises(CheckpointError, match="not saved"):
        run(CheckpointError("x: not saved"))
    with pytest.raises(OSError, match="No space left"):
        run(None)


def test_full_disk_of_the_log_names_it(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, title="t") as log:
        with failing_disk(0), pytest.raises(WriteError, match=r"run.log: not written .*No space left .* needed"):
            log.info("text")
        log.info("later")
    assert "later" in (tmp_path / "run.log").read_text()


def test_peak_memory_without_the_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setitem(sys.modules, "resource", None)
    usage = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 << 30))
    monkeypatch.setattr(run_logger.psutil, "Process", lambda: usage)
    assert run_logger._peak_host_memory() == 3 << 30


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", total_steps=1, title="t", enabled=False) as log:
        log.open_trackers(["csv"], {})
        log.step(1, "")
        log.info("x")
        log.log_metrics(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""


def test_empty_lines_are_not_logged(tmp_path: Path) -> None:
    with RunLog(tmp_path, total_steps=1, title="t") as log:
        log.info("")
        log.info("text")
    assert [line.split(" ", 2)[2] for line in (tmp_path / "run.log").read_text().splitlines()] == ["text"]


def test_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of 3 s for 4 clips each, before which the training waits for 1 s."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    meter = ThroughputMeter()
    for _ in range(2):
        now += 1
        meter.end_wait()
        now += 3
        meter.add_clips(4)
    assert meter.metrics == {"clips_per_s": 1.0, "data_wait_percent": 25.0}
    assert meter.num_steps == 2
    meter.restart()
    assert meter.num_steps == 0
    assert meter.metrics == {"clips_per_s": 0.0, "data_wait_percent": 0.0}


def test_baseline_ratio_of_constant_targets_is_nan() -> None:
    assert baseline_ratio(0.5, 2.0) == 0.25
    assert math.isnan(baseline_ratio(0.5, 0.0))
    assert math.isnan(baseline_ratio(math.nan, 1.0))


def test_peak_memory_has_a_unit() -> None:
    assert re.fullmatch(r"peak (GPU )?memory \d+\.\d GiB", peak_memory())
