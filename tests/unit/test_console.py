import io

import pytest
from rich.console import Console

from mmdistill import console
from mmdistill.console import LINE_INTERVAL_S, ProgressDisplay, log_once, progress


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


def test_same_text_is_logged_once(caplog: pytest.LogCaptureFixture):
    log_once.cache_clear()
    for text in ("a", "b", "a"):
        log_once(text)
    assert [record.message for record in caplog.records] == ["a", "b"]
