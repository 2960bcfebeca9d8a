"""For all tests: scripts without a process of their own, and no trace in the environment of the next module."""

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mmdistill.distributed import launch
from tests.commands import PLACE, ROOT, Script

# the modules that take longest, so that two processes end together
FIRST = ("test_resume", "test_launch", "test_two_processes", "test_strategy", "test_sweep", "test_entrypoints",
         "test_deepspeed_engine", "test_efficiency", "test_tennis", "test_paths")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules first; the order inside a module stays."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True, scope="module")
def no_trace() -> Iterator[None]:
    """`start_process` makes the test process a world of one: commands that later tests start must not inherit that."""
    before, solo = {name: os.environ.get(name) for name in PLACE}, launch._single_process
    yield
    launch._single_process = solo
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Script:
    """``script(NAME, arguments...)``: the ``main`` of scripts/NAME in this process; one of its own takes seconds."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        status = runpy.run_path(str(ROOT / "scripts" / name))["main"]()
        return subprocess.CompletedProcess(sys.argv, int(status), *capfd.readouterr())

    return run
