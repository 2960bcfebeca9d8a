"""Memory and open files of a training over many short epochs, for the main process and the loader workers.

    python benchmarks/endurance.py [--training pretrain|distill] [--minutes 60] [--workers 1] [--json] [KEY=VALUE ...]

A process trains on a tiny dataset, saves a checkpoint in each epoch, and keeps one. Every second the script reads the
anonymous memory (RssAnon) and the number of open files of the process and of its workers. Pages of mapped files are not
counted, because the kernel drops and reads them at any time. A process that fills its caches grows at first, so the
slope of the memory is that of the last two thirds of the time. Batches in shared memory are open files too, so the
growth of the files is the difference between the medians of the last two thirds. The training is stopped with SIGTERM.
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
from typing import Any

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


def anonymous_memory(process: psutil.Process) -> float:
    """RssAnon in MB."""
    (line,) = [s for s in Path(f"/proc/{process.pid}/status").read_text().splitlines() if s.startswith("RssAnon")]
    return int(line.split()[1]) * 1024 / 1e6


def sample_processes(process: psutil.Process) -> dict[str, tuple[float, int]]:
    """Anonymous memory in MB and number of open files of a training and of its workers, by name."""
    found = {"main": (anonymous_memory(process), process.num_fds())}
    for number, child in enumerate(sorted(process.children(), key=lambda child: child.pid)):
        found[f"worker {number}"] = (anonymous_memory(child), child.num_fds())
    return found


def count_epochs(run_dir: Path) -> int:
    """Number of epochs in ``metrics.csv``."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return 0
    with path.open(newline="") as file:
        return sum(1 for _ in csv.DictReader(file))


def measure(training: str, root: Path, *more: str, seconds: float, workers: int = 1) -> dict[str, Any]:
    """Train for `seconds` after the first epoch; slopes, first and last values by process."""
    run_dir = root / f"run_{training}"
    arguments = [f"num_workers={workers}", "trainer.epochs=1000000", "trainer.keep_last=1", *more]
    arguments += [f"hydra.run.dir={run_dir}"]
    log, samples = root / f"{training}.log", {}
    (pid,) = start_training(training_command(training, root, *arguments), ranks=1, log=log, temporary=root)
    process = psutil.Process(pid)
    try:
        while count_epochs(run_dir) == 0:
            if process.status() == psutil.STATUS_ZOMBIE:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        start = time.monotonic()
        while (elapsed := time.monotonic() - start) < seconds:
            for name, (rss, files) in sample_processes(process).items():
                samples.setdefault(name, []).append((elapsed, rss, files))
            time.sleep(min(1.0, seconds / 20))
        epochs = count_epochs(run_dir)
    finally:
        os.kill(pid, signal.SIGTERM)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    result: dict[str, Any] = {"seconds": round(seconds), "epochs": epochs, "status": status, "processes": {}}
    for name, rows in samples.items():
        late = [row for row in rows if row[0] >= seconds / 3]
        times, sizes, files = zip(*late, strict=True)
        result["processes"][name] = {
            "mb_first": rows[0][1], "mb_after_third": sizes[0], "mb_last": sizes[-1],
            "mb_per_hour": slope_per_hour(times, sizes),
            "files": statistics.median(row[2] for row in rows if row[0] < seconds / 3),
            "files_growth": statistics.median(files[len(files) // 2 :]) - statistics.median(files[: len(files) // 2]),
        }  # fmt: skip
    return result


def main() -> int:
    """Run the command; 1 if memory or open files grow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=SCRIPTS, action="append", help="default: both")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the training")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-mb-per-hour", type=float, default=16, help="a larger slope is a leak")
    parser.add_argument("--max-files", type=int, default=5, help="a larger growth is a leak")
    parser.add_argument("--json", action="store_true")
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
        print(json.dumps(results, indent=1))
    is_flat = True
    for training, result in results.items():
        if not args.json:
            print(f"{training}: {result['epochs']} epochs in {result['seconds']} s, exit status {result['status']}")
            print(f"{'':<10}{'MB':>8}{'after 1/3':>11}{'end':>8}{'MB/h':>8}{'files':>7}{'growth':>8}")
        for name, row in result["processes"].items():
            is_flat &= row["mb_per_hour"] <= args.max_mb_per_hour and row["files_growth"] <= args.max_files
            if not args.json:
                sizes = f"{row['mb_first']:>8.1f}{row['mb_after_third']:>11.1f}{row['mb_last']:>8.1f}"
                files = f"{row['files']:>7.0f}{row['files_growth']:>8.0f}"
                print(f"{name:<10}{sizes}{row['mb_per_hour']:>8.1f}{files}")
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
