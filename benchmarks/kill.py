"""Kill trainings with SIGKILL at random moments, resume them, and compare the result with an uninterrupted run.

    python benchmarks/kill.py [--training pretrain|distill] [--kills 100] [--ranks 1|2] [--seed 0]

Each start is a process of its own with its own loader workers, forked from a process that has imported the libraries.
A start is killed in one of these ways, and the next start resumes:

- ``main``: one process at a random moment; of two ranks, the other one then gets SIGTERM, as launchers do;
- ``group``: all processes at once;
- ``worker``: one loader worker;
- ``save``: all processes at a random moment after a temporary file appears in the folder of checkpoints.

After each kill, the newest complete checkpoint must contain all logged epochs but the last one, the next start must
resume from it, and all processes must end by themselves. A completed run must have the same files, metrics and
weights as a run without kills, and no file may be left in the folder for temporary files and in ``/dev/shm``.
"""

import argparse
import contextlib
import csv
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

import mmdistill.distill  # noqa: E402
import mmdistill.pretrain  # noqa: E402, F401
from mmdistill.checkpoint import latest_valid_checkpoint, read_checkpoint  # noqa: E402
from mmdistill.files import remove_temporary_folders  # noqa: E402
from tests.ranks import import_zero  # noqa: E402
from tests.tiny_runs import SCRIPTS, start_training, training_command  # noqa: E402

KINDS = ("main", "group", "worker", "save")
ORPHANS_S = 15.0  # a loader worker looks for its parent every 5 s
END_S = 60.0  # time in which a process that lost another one must end
NOT_REPEATABLE = ("run.json", "run.log", ".hydra", "tensorboard", "main")  # `*_main*.log`: one line per start


@dataclass
class Report:
    """What was done and what failed."""

    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0
    completed: int = 0
    repeated: int = 0  # epochs that were trained twice
    failures: list[str] = field(default_factory=list)

    def check(self, condition: bool, text: str) -> None:
        """Record a failure."""
        if not condition:
            self.failures.append(text)
            print(f"FAILED: {text}", file=sys.stderr, flush=True)


def session_members(sessions: set[int]) -> list[int]:
    """Living processes of these sessions, without those that have ended and whose parent has not noticed."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in sessions and fields[0] not in "ZX":
                found.append(int(entry.name))
    return found


def wait_until(condition, timeout_s: float, interval_s: float = 0.002) -> bool:
    """Wait until ``condition()``; False after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(interval_s)
    return True


def has_ended(pid: int) -> bool:
    """Whether a child has ended; its status stays readable."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def has_temporary(folder: Path) -> bool:
    """Whether a save is in progress."""
    try:
        return any(name.startswith((".tmp-", ".old-", ".trash-")) for name in os.listdir(folder))
    except OSError:
        return False


def kill_sometime(kind: str, pids: list[int], checkpoints: Path, rng: random.Random, seconds: float) -> bool:
    """Kill in the given way within `seconds`; False if the training ended before."""
    ended = lambda: all(map(has_ended, pids))  # noqa: E731
    victim = rng.choice(pids)
    delay = rng.uniform(0.05, seconds)
    if kind == "save":
        if not wait_until(lambda: ended() or has_temporary(checkpoints), END_S, 0.0003):
            return False
        delay = rng.uniform(0, 0.03)
    if wait_until(ended, delay):
        return False
    if kind == "worker":
        workers = [pid for pid in session_members(set(pids)) if pid not in pids]
        if not workers:
            return kill_sometime("main", pids, checkpoints, rng, 0.1)
        victim = rng.choice(workers)
    for pid in session_members(set(pids)) if kind in ("group", "save") else [victim]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return True


def epochs_saved(checkpoints: Path) -> int:
    """Complete epochs in the newest checkpoint; 0 without one. Inside an epoch its name contains ``-step=``."""
    names = [path.name for path in checkpoints.glob("epoch=*")] if checkpoints.is_dir() else []
    return max((int(name[6:].partition("-")[0]) + ("-step=" not in name) for name in names), default=0)


def metrics(run_dir: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, without what depends on the speed of the machine."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return []
    timed = ("clips_per_s", "data_wait_percent", "mfu_percent")
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in timed} for row in csv.DictReader(file)]


def files(run_dir: Path) -> set[str]:
    """Names of all files of a run, also of locks and temporary files, except those with one part per start."""
    names = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*")}
    return {name for name in names if name.split("/")[0] not in NOT_REPEATABLE}


def final_weights(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    """Weights of the newest checkpoint, and of ``last.ckpt`` if there is one."""
    newest, last = latest_valid_checkpoint(run_dir / "checkpoints"), run_dir / "checkpoints" / "last.ckpt"
    assert newest is not None
    return [read_checkpoint(path).state_dict for path in (newest, last) if path.exists()]


def is_equal(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    """Whether all tensors are bit-identical."""
    same_names = [set(x) for x in a] == [set(x) for x in b]
    return same_names and all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x)


def shared_memory() -> set[str]:
    """Segments that torch, DeepSpeed and multiprocessing have created, except those of torch of living processes.

    Semaphores are not listed: only those of spawned processes have names, and these trainings fork their workers.
    """
    names = [n for n in os.listdir("/dev/shm") if n.startswith(("torch_", "deepspeed_", "psm_", "pymp-"))]
    return {name for name in names if name[:6] != "torch_" or not psutil.pid_exists(int(name.split("_")[1]))}


class Campaign:
    """Kills of one training. `root` is an empty folder."""

    def __init__(self, training: str, root: Path, *, ranks: int = 1, epochs: int = 10, seed: int = 0) -> None:
        self.root, self.ranks, self.report, self.rng = root, ranks, Report(), random.Random(seed)
        self.log = root / "log"
        root.mkdir(parents=True)
        self.temporary = Path(tempfile.mkdtemp(prefix="kill-"))  # short, because the paths of sockets are limited
        strategy = {"pretrain": "deepspeed_stage_1", "distill": "ddp"}[training]
        more = [f"trainer.epochs={epochs}", "trainer.keep_last=2", "num_workers=1"]
        more += [f"strategy={strategy}", f"devices={ranks}"] if ranks > 1 else []
        self.command = training_command(training, root, *more, "resume=auto")
        self.sessions: set[int] = set()  # of killed starts
        self.memory = shared_memory()
        begin = time.monotonic()
        self.reference = root / "reference"
        status = self._wait(self._start(self.reference))
        self.seconds = time.monotonic() - begin
        if status != [0] * ranks:
            raise RuntimeError(self.log.read_text())
        self.expected = (files(self.reference), metrics(self.reference), final_weights(self.reference))

    def _start(self, run_dir: Path) -> list[int]:
        self.log.write_text("")
        command = [*self.command, f"hydra.run.dir={run_dir}"]
        return start_training(command, ranks=self.ranks, log=self.log, temporary=self.temporary)

    def _wait(self, pids: list[int], timeout_s: float = 600) -> list[int]:
        """Exit statuses; -9 for processes that do not end in time."""
        if not wait_until(lambda: all(map(has_ended, pids)), timeout_s, 0.01):
            for pid in pids:
                os.kill(pid, signal.SIGABRT)  # prints the stack
            wait_until(lambda: all(map(has_ended, pids)), 5)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            text = self.log.read_text()[-4000:]
            self.report.check(False, f"processes {pids} did not end in {timeout_s:.0f} s: {text}")
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def _end_other_ranks(self, pids: list[int]) -> None:
        """End them as launchers do: SIGTERM, and SIGKILL after a while."""
        for number, timeout_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, END_S)):
            for pid in pids:
                if not has_ended(pid):
                    os.kill(pid, number)
            if wait_until(lambda: all(map(has_ended, pids)), timeout_s, 0.01):
                return

    def run(self, kills: int, kinds: tuple[str, ...] = KINDS) -> Report:
        """Kill `kills` starts, in runs that are then completed."""
        number = 0
        while sum(self.report.kills.values()) < kills:
            self._run_to_the_end(self.root / f"run_{number}", kills, kinds)
            number += 1
        self._check_leftovers()
        return self.report

    def _run_to_the_end(self, run_dir: Path, kills: int, kinds: tuple[str, ...]) -> None:
        report, checkpoints, statuses, saved = self.report, run_dir / "checkpoints", [-9], 0
        while any(statuses):
            report.starts += 1
            pids = self._start(run_dir)
            done = sum(report.kills.values())
            kind = kinds[done % len(kinds)]
            where = f"{run_dir.name}, start {report.starts}, {kind}"
            is_killed = done < kills and kill_sometime(kind, pids, checkpoints, self.rng, self.seconds)
            if is_killed and self.ranks > 1:
                self._end_other_ranks(pids)
            statuses = self._wait(pids, END_S if is_killed else 600)
            text = self.log.read_text()
            found = re.search(r"resumed from .* at epoch (\d+)", text)
            report.check(found is None or int(found[1]) == saved, f"{where}: resumed at {found}, saved {saved}")
            if not is_killed:
                report.check(not any(statuses), f"{where}: status {statuses}\n{text[-3000:]}")
                if any(statuses):
                    return
                break
            report.kills[kind] += 1
            self.sessions |= set(pids)
            if "Traceback" in text and kind != "worker" and self.ranks == 1:
                report.check(False, f"{where}: {text[-3000:]}")
            rows, before, saved = metrics(run_dir), saved, epochs_saved(checkpoints)
            report.check([int(row["epoch"]) for row in rows] == list(range(len(rows))), f"{where}: metrics {rows}")
            report.check(len(rows) - saved in (0, 1), f"{where}: {len(rows)} epochs logged, {saved} saved")
            report.check(saved >= before, f"{where}: {before} epochs were saved, now {saved}")
            report.repeated += len(rows) - saved
        report.completed += 1
        names, rows, weights = self.expected
        report.check(files(run_dir) == names, f"{run_dir.name}: other files: {sorted(files(run_dir) ^ names)}")
        report.check(metrics(run_dir) == rows, f"{run_dir.name}: other metrics")
        report.check(is_equal(final_weights(run_dir), weights), f"{run_dir.name}: other weights")

    def _check_leftovers(self) -> None:
        wait_until(lambda: not session_members(self.sessions), ORPHANS_S, 0.1)
        members = session_members(self.sessions)
        self.report.check(not members, f"processes that did not end: {members}")

        def has_no_files() -> bool:
            remove_temporary_folders(self.temporary)  # as the next command does
            return not any(self.temporary.iterdir())

        wait_until(has_no_files, ORPHANS_S, 0.1)  # a lock is released shortly after its process has ended
        left = sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))
        self.report.check(not left, f"temporary files: {Counter(re.sub(r'[0-9a-f_-]{6,}.*', '*', n) for n in left)}")
        shutil.rmtree(self.temporary)
        memory = shared_memory() - self.memory
        self.report.check(not memory, f"shared memory: {sorted(memory)}")


def main() -> int:
    """Run the command; 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", choices=SCRIPTS, action="append", help="default: both")
    parser.add_argument("--kills", type=int, default=100, help="for each training")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--folder", type=Path, help="keep all files in this folder")
    args = parser.parse_args()
    import_zero()
    failed = False
    with contextlib.ExitStack() as stack:
        folder = args.folder
        if folder is None:
            folder = Path(tempfile.mkdtemp())  # each fork would remove a TemporaryDirectory at its exit
            stack.callback(shutil.rmtree, folder)
        for training in args.training or SCRIPTS:
            campaign = Campaign(training, folder / training, ranks=args.ranks, epochs=args.epochs, seed=args.seed)
            report = campaign.run(args.kills, tuple(args.kinds))
            kinds = ", ".join(f"{kind} {count}" for kind, count in report.kills.items())
            title = f"{training}, {args.ranks} rank(s): {sum(report.kills.values())} kills ({kinds})"
            print(f"{title}, {report.starts} starts, {report.completed} completed runs")
            print(f"{report.repeated} epochs repeated, {len(report.failures)} failures", flush=True)
            failed |= bool(report.failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
