"""Runs an entrypoint that receives a stop signal in a chosen call, together with its whole process group.

python tests/integration/signal_shim.py START_METHOD SIGNAL CALL SCRIPT ARGUMENTS...

Loader workers start with START_METHOD. In the CALL-th backward pass, or in the CALL-th encoding of an evaluation, the
process sends SIGNAL to its process group, as schedulers do. CALL 0 sends none.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import time
from typing import Any

import torch

from mmdistill.models.videomae import Encoder


def _signal_group(number: signal.Signals) -> None:
    """Signal this process group from another process: torch's workers treat a signal of their parent as its request."""
    pid = os.fork()
    if pid == 0:
        signal.signal(number, signal.SIG_IGN)  # the sender is in the group too
        os.killpg(0, number)
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(0.5)  # a worker that the signal ends has ended by now


def main() -> None:
    """Patch the calls, then become the script."""
    method, name, call, script, *arguments = sys.argv[1:]
    os.setsid()
    multiprocessing.set_start_method(method, force=True)
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done == int(call):
            _signal_group(signal.Signals[name])

    def counted(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return wrapper

    if "train=False" in arguments:
        Encoder.embed = counted(Encoder.embed)  # type: ignore[method-assign]
    else:
        torch.Tensor.backward = counted(torch.Tensor.backward)  # type: ignore[method-assign]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
