"""``trainer.profile``: a trace of some training steps with `torch.profiler`.

The code of both trainings names the ranges ``wait for data``, ``transfer``, ``forward``, ``backward``, ``optimizer``.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, schedule

from mmdistill.files import replace_file, temporary_path, write_errors

NUM_WARMUP_STEPS = 3  # before the first step of a trace


def start_trace(
    run_dir: Path, device: torch.device, *, num_steps: int, steps_done: int, info: Callable[[str], None]
) -> profile:
    """Start a profiler that counts the steps of this process by its method `step`; `stop` ends it.

    After `NUM_WARMUP_STEPS` and `num_steps` steps it writes the trace of the latter to ``trace-steps=A-B.json`` in
    `run_dir`, and logs its path with `info`. A and B are numbers of steps from 1; `steps_done` were done before. A
    training that ends before writes nothing.
    """
    before = steps_done + NUM_WARMUP_STEPS
    first, last = before + 1, before + num_steps
    path = run_dir / f"trace-steps={first}-{last}.json"

    def write(profiler: profile) -> None:
        if profiler.step_num < NUM_WARMUP_STEPS + num_steps:
            return
        temporary = temporary_path(path)
        with write_errors(path):
            profiler.export_chrome_trace(str(temporary))
            replace_file(temporary, path)
        info(f"trace of the steps {first} to {last}: {path}; open it in ui.perfetto.dev or chrome://tracing")

    profiler = profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])],
        schedule=schedule(skip_first=NUM_WARMUP_STEPS - 1, wait=0, warmup=1, active=num_steps, repeat=1),
        on_trace_ready=write,
        experimental_config=_ExperimentalConfig(profile_all_threads=True),  # teachers may run in threads
    )
    profiler.start()
    return profiler
