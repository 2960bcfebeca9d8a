"""Stop signals set a flag while the context is open."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from mmdistill.distributed import launch
from mmdistill.training import signals
from mmdistill.training.signals import stop_message, stop_signals


def test_signal_is_recorded_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with stop_signals(("SIGUSR1", "SIGTERM")) as received:
        assert received() is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received() == signal.SIGUSR1  # the first one
    assert signal.getsignal(signal.SIGUSR1) is before


def test_second_sigint_raises() -> None:
    with stop_signals(("SIGINT",)) as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_exited_launcher_counts_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launcher_exited", lambda: True)
    with stop_signals(("SIGUSR1",)) as received:
        assert received() == signal.SIGTERM


def test_message_contains_the_resume_keys() -> None:
    message = stop_message(Path("my run/checkpoints/last.ckpt"), Path("my run"))
    assert "complete checkpoint written: my run/checkpoints/last.ckpt" in message
    assert message.endswith("add to the same command: resume=auto 'hydra.run.dir=my run'")


def test_message_of_a_job_of_a_sweep_names_the_folder_of_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = SimpleNamespace(mode=RunMode.MULTIRUN, sweep=SimpleNamespace(dir=str(tmp_path)))
    holder = SimpleNamespace(initialized=lambda: True, get=lambda: config)
    monkeypatch.setattr(signals, "HydraConfig", holder)
    message = stop_message(tmp_path / "job_0" / "checkpoints" / "last.ckpt", tmp_path / "job_0")
    assert message.endswith(f"resume=auto hydra.sweep.dir={tmp_path}")
