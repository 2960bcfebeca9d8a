"""Memory, open files and threads of a training over many short epochs, for the main process and the loader workers.

    python benchmarks/endurance.py [--training pretrain|distill] [--minutes 60] [--workers 1] [KEY=VALUE ...]

A process trains on a tiny dataset, saves a checkpoint in each epoch, and keeps one. Every second the script reads these
numbers of the process and of its workers:

- anonymous memory: what the process has allocated. A leak is here;
- mapped memory: pages of files and of shared memory. The kernel drops and reads pages of files at any time;
- open files, to which batches in shared memory belong, and threads.

A process that fills its caches and the free lists of the allocator grows at first. The slope of the memory is therefore
that of the least-squares line through the last two thirds of the time. The growth of open files and of threads is the
difference between the medians of the two halves of this time. Flat means: the anonymous memory of no process grows
faster than ``--max-mb-per-hour``, its open files grow by at most ``--max-files`` and its threads by at most
``--max-threads``. Mapped memory is only reported. The training is stopped with SIGTERM.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mmdistill.distill  # noqa: E402
import mmdistill.pretrain  # noqa: E402, F401
from tests.tiny_runs import SCRIPTS, start_training, training_command  # noqa: E402


def slope_per_hour(times_s: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line."""
    return 3600 * statistics.linear_regression(times_s, values).slope if len(set(times_s)) > 1 else 0.0


class Sample(NamedTuple):
    """Numbers of one process; memory in MB."""

    time_s: float
    anonymous: float
    mapped: float
    files: int
    threads: int


def sample_process(process: psutil.Process, time_s: float) -> Sample:
    """The numbers of one process at a time."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {name: int(value.split()[0]) * 1024 / 1e6 for name, _, value in (line.partition(":") for line in lines)}
    mapped = sizes["Rss"] - sizes["Anonymous"]
    return Sample(time_s, sizes["Anonymous"], mapped, process.num_fds(), process.num_threads())


def sample_processes(process: psutil.Process, time_s: float) -> dict[str, Sample]:
    """The numbers of a training and of its workers, by name."""
    workers = sorted(process.children(), key=lambda child: child.pid)
    names = {"main": process, **{f"worker {number}": child for number, child in enumerate(workers)}}
    return {name: sample_process(each, time_s) for name, each in names.items()}


def summarize(samples: Sequence[Sample], seconds: float) -> dict[str, float]:
    """First and last values, and the growth in the last two thirds of `seconds`."""
    late = [sample for sample in samples if sample.time_s >= seconds / 3]
    halves = late[: len(late) // 2], late[len(late) // 2 :]
    times, result = [sample.time_s for sample in late], {}
    for name in ("anonymous", "mapped"):
        values = [getattr(sample, name) for sample in late]
        result[f"{name}_first"] = getattr(samples[0], name)
        result |= {f"{name}_after_third": values[0], f"{name}_last": values[-1]}
        result[f"{name}_per_hour"] = slope_per_hour(times, values)
    for name in ("files", "threads"):
        before, after = (statistics.median(getattr(sample, name) for sample in half) for half in halves)
        result |= {name: after, f"{name}_growth": after - before}
    return result


def count_epochs(run_dir: Path) -> int:
    """Number of epochs in ``metrics.csv``."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def measure(training: str, root: Path, *more: str, seconds: float, workers: int = 1) -> dict[str, Any]:
    """Train for `seconds` after the first epoch; see `summarize` for the numbers of each process."""
    run_dir = root / f"run_{training}"
    arguments = [f"num_workers={workers}", "trainer.epochs=1000000", "trainer.keep_last=1", *more]
    arguments += [f"hydra.run.dir={run_dir}"]
    log = root / f"{training}.log"
    samples: dict[str, list[Sample]] = {}
    (pid,) = start_training(training_command(training, root, *arguments), ranks=1, log=log, temporary=root)
    process = psutil.Process(pid)
    try:
        while count_epochs(run_dir) == 0:
            if process.status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < seconds:
            for name, sample in sample_processes(process, elapsed).items():
                samples.setdefault(name, []).append(sample)
            time.sleep(min(1.0, seconds / 20))
        epochs = count_epochs(run_dir)
    finally:
        os.kill(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    processes = {name: summarize(values, seconds) for name, values in samples.items()}
    return {"seconds": round(seconds), "epochs": epochs, "status": status, "processes": processes}


def main() -> int:
    """Run the command; 1 if anonymous memory, open files or threads grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=SCRIPTS, action="append", help="default: both")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the training")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-mb-per-hour", type=float, default=16, help="a larger slope is a leak")
    parser.add_argument("--max-files", type=int, default=5, help="a larger growth is a leak")
    parser.add_argument("--max-threads", type=int, default=0, help="a larger growth is a leak")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())  # a fork would remove a TemporaryDirectory at its exit
    try:
        results = {
            training: measure(training, folder, *args.overrides, seconds=60 * args.minutes, workers=args.workers)
            for training in args.training or SCRIPTS
        }
    finally:
        shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    is_flat = True
    for training, result in results.items():
        print(f"{training}: {result['epochs']} epochs in {result['seconds']} s, exit status {result['status']}")
        for name, row in result["processes"].items():
            for kind in ("anonymous", "mapped"):
                sizes = [row[f"{kind}_{when}"] for when in ("first", "after_third", "last")]
                text = " -> ".join(f"{size:.1f}" for size in sizes)
                print(f"  {name}: {kind} memory {text} MB, {row[f'{kind}_per_hour']:+.1f} MB/h")
            counts = [f"{row[kind]:.0f} {kind} ({row[f'{kind}_growth']:+.0f})" for kind in ("files", "threads")]
            print(f"  {name}: {', '.join(counts)}")
            is_flat &= row["anonymous_per_hour"] <= args.max_mb_per_hour
            is_flat &= row["files_growth"] <= args.max_files and row["threads_growth"] <= args.max_threads
    print("flat" if is_flat else "not flat")
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
