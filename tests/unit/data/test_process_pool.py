"""Pools of processes that end with their command."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from mmdistill.data.process_pool import process_pool


def _write_pid_and_wait(path: Path, seconds: float) -> int:
    path.write_text(str(os.getpid()))
    time.sleep(seconds)
    return os.getpid()


def _wait_for_pid(path: Path) -> int:
    for _ in range(600):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError("the process has not started")


def test_jobs_run_in_other_processes_which_end(tmp_path: Path) -> None:
    with process_pool(1) as pool:
        found = pool.submit(_write_pid_and_wait, tmp_path / "pid", 0).result()
    assert found != os.getpid()
    assert not psutil.pid_exists(found)


def test_an_exception_kills_the_processes_and_drops_jobs(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), process_pool(1) as pool:  # noqa: PT012
        jobs = [pool.submit(_write_pid_and_wait, tmp_path / f"pid{i}", 600) for i in range(3)]
        process = psutil.Process(_wait_for_pid(tmp_path / "pid0"))
        raise KeyboardInterrupt
    assert process.wait(30) is None or not process.is_running()
    assert jobs[2].cancelled() or jobs[2].exception() is not None
    assert not (tmp_path / "pid1").exists()


def test_sigterm_ends_the_processes_too(tmp_path: Path) -> None:
    def run() -> None:
        with process_pool(1) as pool:
            pool.submit(_write_pid_and_wait, tmp_path / "pid", 600).result()

    main = multiprocessing.get_context("fork").Process(target=run)
    main.start()
    worker = psutil.Process(_wait_for_pid(tmp_path / "pid"))
    assert main.pid is not None
    os.kill(main.pid, signal.SIGTERM)
    main.join(30)
    assert main.exitcode == 128 + signal.SIGTERM
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()
