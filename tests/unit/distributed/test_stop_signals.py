"""Stop signals while a command has nothing to save."""

import os
import signal
import sys
import time
from contextlib import suppress

import pytest

from mmdistill.distributed.stop_signals import INTERRUPTED_EXIT_CODE, RESEND_S, exit_on_stop_signal, signal_handler


class _SignalInFinalizer:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_signal_during_a_callback_also_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python ignores the exception of a handler that runs in a finalizer."""
    monkeypatch.setattr(sys, "argv", ["mmdistill evaluate", "x=1"])

    def signal_and_wait() -> None:
        _SignalInFinalizer()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            time.sleep(0.01)

    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended, exit_on_stop_signal(["SIGUSR1"], hint="to evaluate: x"):
        signal_and_wait()
    assert ended.value.code == INTERRUPTED_EXIT_CODE
    assert "mmdistill evaluate: stopped by a signal; to evaluate: x" in capsys.readouterr().err
    assert (sys.unraisablehook, signal.getsignal(signal.SIGUSR1)) == (hook, handler)


def test_a_library_that_catches_every_exception_does_not_stop_the_signal() -> None:
    def swallow_and_wait() -> None:
        deadline = time.monotonic() + 60
        for _ in range(3):
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
                while time.monotonic() < deadline:
                    time.sleep(0.01)
            except BaseException:
                pass
        while time.monotonic() < deadline:
            time.sleep(0.01)

    with pytest.raises(SystemExit, match="85"), exit_on_stop_signal(["SIGUSR1"]):
        swallow_and_wait()


def test_the_repeated_signal_does_not_interrupt_the_cleanup() -> None:
    cleaned: list[str] = []

    def stop_and_clean() -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        finally:
            time.sleep(5 * RESEND_S)
            try:
                raise KeyError
            except KeyError:
                time.sleep(5 * RESEND_S)
            cleaned.append("all")

    with pytest.raises(SystemExit, match="85"), exit_on_stop_signal(["SIGUSR1"]):
        stop_and_clean()
    assert cleaned == ["all"]


def test_another_handler_gets_the_signal_that_was_dropped_once() -> None:
    """A training installs its own handlers: it saves a checkpoint at the first signal, and stops at the second."""
    recorded: list[int] = []
    with exit_on_stop_signal(["SIGUSR1"]):
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGUSR1)
        with signal_handler(["SIGUSR1"], lambda number, frame: recorded.append(number)):
            time.sleep(10 * RESEND_S)
    assert recorded == [signal.SIGUSR1]


@pytest.mark.parametrize(("rank", "is_printed"), [("0", True), ("1", False)])
def test_one_rank_prints_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, is_printed: bool
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit), exit_on_stop_signal(["SIGTERM"]):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ("stopped by a signal; run the same command again" in capsys.readouterr().err) is is_printed


def test_the_exit_of_the_work_itself_prints_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="85"), exit_on_stop_signal(["SIGTERM"]):
        raise SystemExit(INTERRUPTED_EXIT_CODE)
    assert capsys.readouterr().err == ""
