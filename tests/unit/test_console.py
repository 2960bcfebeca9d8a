import io
import logging
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from mmdistill import console
from mmdistill.console import (
    COMMAND_ID,
    LINE_INTERVAL_S,
    ProgressDisplay,
    exit_if_pipe_closed,
    log_once,
    progress,
    record_warnings,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def make_display(lines: list[str], **options: object) -> ProgressDisplay:
    return ProgressDisplay("encoding", 40, print_line=lines.append, **options)


def test_without_a_terminal_lines_are_at_least_15_seconds_apart(clock: Clock):
    lines: list[str] = []
    with make_display(lines) as display:
        for step in range(1, 41):
            clock.now += 1.0
            display.update(step)
    assert lines == ["encoding 16/40 ETA 0:00:24", "encoding 32/40 ETA 0:00:08"]
    assert LINE_INTERVAL_S == 15


def test_show_ends_adds_lines_at_the_first_and_last_step(clock: Clock):
    lines: list[str] = []
    with make_display(lines, show_ends=True) as display:
        for step in (1, 2, 40):
            clock.now += 0.5
            display.update(step, note="loss 0.5")
    assert lines == ["encoding 1/40 loss 0.5 ETA ?", "encoding 40/40 loss 0.5 ETA 0:00:00"]


def test_remaining_time_has_hours_minutes_and_seconds(clock: Clock):
    lines: list[str] = []
    with make_display(lines) as display:
        display.update(1)
        clock.now += 100.0
        display.update(2)
    assert lines == ["encoding 2/40 ETA 1:03:20"]


def test_a_disabled_display_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]):
    lines: list[str] = []
    with make_display(lines, enabled=False, show_ends=True) as display:
        clock.now += 100.0
        display.update(40)
        display.print("text")
    assert lines == []
    assert capsys.readouterr() == ("", "")


def test_progress_adds_up_the_steps(clock: Clock, capsys: pytest.CaptureFixture[str]):
    with progress("demo", 10, show_ends=True) as advance:
        advance(3)
        clock.now += 1.0
        advance(7)
    assert capsys.readouterr().err.splitlines() == ["demo 3/10 ETA ?", "demo 10/10 ETA 0:00:00"]


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch):
    out, lines = io.StringIO(), []
    monkeypatch.setattr(
        console, "Console", lambda file: Console(file=out, force_terminal=True, width=100, color_system=None)
    )
    with make_display(lines, show_ends=True) as display:
        display.update(40)
        display.print("a line above the bar")
    assert "40/40" in out.getvalue()
    assert "a line above the bar" in out.getvalue()
    assert lines == []


@pytest.mark.usefixtures("new_command")
def test_same_text_or_key_is_logged_once(caplog: pytest.LogCaptureFixture):
    for text, key in (("a", None), ("b", None), ("a", None), ("c", "a"), ("d", "key"), ("e", "key")):
        log_once(text, key)
    assert [record.message for record in caplog.records] == ["a", "b", "d"]


@pytest.mark.usefixtures("new_command")
def test_other_ranks_do_not_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        log_once("a")
    assert [record.message for record in caplog.records] == ["a"]


@pytest.mark.usefixtures("new_command")
@pytest.mark.parametrize("has_folder", [True, False])
def test_processes_of_a_command_log_a_text_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_folder: bool):
    if not has_folder:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    code = "import sys, tempfile\ntempfile.tempdir = sys.argv[1]\nfrom mmdistill.console import log_once\nlog_once('a')"
    command = [sys.executable, "-c", code, tempfile.gettempdir()]
    done = [subprocess.run(command, capture_output=True, text=True, check=True).stderr for _ in range(2)]
    assert done == (["a\n", ""] if has_folder else ["a\n", "a\n"])


def test_temporary_files_are_removed_at_the_end_of_the_command(tmp_path: Path):
    code = "import os, sys, tempfile\ntempfile.tempdir = sys.argv[1]\nfrom mmdistill.console import log_once\n"
    code += "log_once('a')\nprint(len(os.listdir(sys.argv[1])))"
    environment = {name: value for name, value in os.environ.items() if name != COMMAND_ID}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, os.listdir(tmp_path)) == ("1\n", [])


@pytest.mark.usefixtures("new_command")
def test_files_of_killed_commands_are_removed(tmp_path: Path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    for pid in (killed.pid, os.getpid()):
        (tmp_path / f"mmdistill-log-{pid}-a-b").touch()
    console._remove_temporary_files()
    assert os.listdir(tmp_path) == [f"mmdistill-log-{os.getpid()}-a-b"]


@pytest.mark.usefixtures("new_command")
def test_warnings_are_recorded_once_also_those_of_workers():
    log_once("before")
    log = logging.getLogger("mmdistill.data")
    with record_warnings() as warnings:
        assert warnings() == []
        log.info("no warning")
        for text in ("a", "b", "a"):
            log.warning(text)
        log_once("before")
        worker = multiprocessing.get_context("fork").Process(target=log.warning, args=("of a worker: 网球",))
        worker.start()
        worker.join()
        assert warnings() == ["a", "b", "before", "of a worker: 网球"]
    log.warning("after")
    assert warnings is not None
    assert logging.getLogger("mmdistill").handlers == []


def test_recorded_warnings_are_in_a_file_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that none remains after SIGKILL."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with record_warnings() as warnings:
        logging.getLogger("mmdistill.data").warning("joints outside")
        assert warnings() == ["joints outside"]
        assert not list(tmp_path.iterdir())


def test_recorded_warnings_are_shown_without_any_other_handler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with record_warnings():
        logging.getLogger("mmdistill.data").warning("joints outside")
    assert "joints outside" in capsys.readouterr().err


PRINT = "import sys; from mmdistill.console import exit_if_pipe_closed\nwith exit_if_pipe_closed(): "


@pytest.mark.parametrize("statement", ["print('x' * 10**6)", "print('x')", "print('x'); sys.exit(0)"])
def test_closed_pipe_ends_the_process_without_a_traceback(statement: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-c", PRINT + statement], stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, b"")


def test_other_closed_pipes_are_errors() -> None:
    with pytest.raises(BrokenPipeError), exit_if_pipe_closed():
        raise BrokenPipeError
