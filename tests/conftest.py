"""Fixtures and markers of all tests."""

import gc
import os
import runpy
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdistill.console import COMMAND_ID
from tests.commands import RANK_VARIABLES, ROOT, Script

# No test may compile an op of DeepSpeed: torch cannot create this build folder.
os.environ["TORCH_EXTENSIONS_DIR"] = "/dev/null/build"
INTEGRATION = ROOT / "tests" / "integration"
# Modules that take longest. They start first, so that parallel test processes end at about the same time.
LONGEST = ("test_resume", "test_launch", "test_two_processes", "test_strategy", "test_sweep", "test_entrypoints",
           "test_deepspeed_engine", "test_efficiency", "test_signals", "test_tennis", "test_paths", "test_run",
           "test_renames", "test_validation", "test_pipeline")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of tests/integration as slow and run the longest modules first, each in its own order."""
    for item in items:
        if item.path.is_relative_to(INTEGRATION):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exclude the imported modules from garbage collection: each full collection would visit all their objects."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def isolated_env() -> Iterator[None]:
    """Restore the variables of a launcher after each module: `start_process` sets them, and commands inherit them."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    yield
    _leave_process_group()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _leave_process_group() -> None:
    """Destroy the process group that a training in this process has left, and DeepSpeed's record of it."""
    if (comm := sys.modules.get("deepspeed.comm")) is not None and comm.is_initialized():
        comm.destroy_process_group()
    elif (dist := sys.modules.get("torch.distributed")) is not None and dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def new_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`log_once` has logged no text yet. Its files are in `tmp_path`."""
    monkeypatch.setenv(COMMAND_ID, f"test-{uuid.uuid4().hex}")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Script:
    """``script(NAME, arguments...)`` runs scripts/NAME in this process, which saves seconds."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), *capfd.readouterr())

    return run
