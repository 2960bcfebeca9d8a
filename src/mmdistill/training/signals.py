"""Stop signals: SIGTERM, SIGINT and SIGUSR1 set a flag that the training loop reads."""

import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from mmdistill.distributed import launch
from mmdistill.distributed.stop_signals import signal_handler

StopSignal = Callable[[], int | None]  # the number of the received signal, or None


@contextmanager
def stop_signals(names: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR1")) -> Iterator[StopSignal]:
    """While open, these signals are only recorded. A second SIGINT raises `KeyboardInterrupt` at once.

    Yields:
        A function that returns the number of the first received signal, or None. A launcher that has exited counts as
        SIGTERM.
    """
    received: list[int] = []

    def record_signal(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    def first_received() -> int | None:
        if received:
            return received[0]
        return int(signal.SIGTERM) if launch.launcher_exited() else None

    with signal_handler(names, record_signal):
        yield first_received


def stop_message(checkpoint: Path, run_dir: Path) -> str:
    """The last message of a run in `run_dir` that a signal stopped after it wrote `checkpoint`.

    It contains the overrides that resume the run, or the sweep of which the run is a job, quoted for the shell.
    """
    key, folder = "hydra.run.dir", str(run_dir)
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        key, folder = "hydra.sweep.dir", str(Path(HydraConfig.get().sweep.dir).absolute())
    return (
        f"stopped by a signal; complete checkpoint written: {checkpoint}\n"
        f"to resume, add to the same command: resume=auto {shlex.quote(f'{key}={folder}')}"
    )
