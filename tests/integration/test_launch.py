"""Real launchers with two processes: one run directory, signals, a killed rank, a hung rank, a dead loader worker."""

import contextlib
import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mmdistill.distributed import launch
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from tests.commands import environment, run_python
from tests.ranks import free_port
from tests.tiny_data import MODEL, make_tiny, overrides

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = environment(DS_ACCELERATOR="cpu")
HANG_TIMEOUT_S = 300.0  # seconds until a run counts as hung, also on a busy machine
RANK_DEPENDENT = "${now:%S-%f}"  # a folder name that differs between ranks
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())],
    "devices=2": [sys.executable],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data"))


def _command(launcher: str, data: list[str], folder: str, *arguments: str) -> list[str]:
    own = ["devices=2"] if launcher == "devices=2" else []
    common = ["modality=flow", *data, *MODEL, "batch_size=4", "trainer.epochs=1", "accelerator=cpu", *own]
    return [*LAUNCHERS[launcher], "pretrain_main.py", *common, *arguments, f"hydra.run.dir={folder}"]


# A constant learning rate: the loss of the first epoch does not depend on the number of epochs.
CONSTANT_LR = ("trainer.lr=0.01", "trainer.min_lr=0.01", "trainer.warmup_lr=0.01")


@pytest.fixture(scope="module")
def single_process_loss(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Loss of the first epoch of a run of one process with the same global batch."""
    run = tmp_path_factory.mktemp("single")
    _, *command = _command("devices=2", data, str(run), *CONSTANT_LR)
    run_python(*(a for a in command if a not in ("devices=2", "batch_size=4")), "batch_size=8")
    return _loss(run)


def _loss(run: Path) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        return float(next(csv.DictReader(file))["loss"])


def _check_one_run_dir(root: Path, loss: float) -> None:
    """All ranks wrote to one folder, and the loss of the first epoch is `loss`."""
    (run,) = root.iterdir()
    assert _loss(run) == pytest.approx(loss, rel=1e-5)
    assert (run / "run.log").read_text().count("epoch 0: loss") == 1
    assert (run / "run.json").is_file()


def test_deepspeed_launcher_makes_one_run_dir_and_the_loss_of_one_process(
    data: list[str], single_process_loss: float, tmp_path: Path
) -> None:
    command = _command("deepspeed", data, f"{tmp_path}/{RANK_DEPENDENT}", *CONSTANT_LR)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANG_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    _check_one_run_dir(tmp_path, single_process_loss)


class _RunEndedError(Exception):
    """A run ended before its first epoch."""


class _Running:
    """A run of two ranks in the background, after its first epoch; its folder lies in `root`."""

    def __init__(self, command: list[str], root: Path) -> None:
        self.root = root
        self.errors = root.with_name(root.name + ".err").open("a+")
        self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=self.errors, stderr=self.errors)
        deadline = time.monotonic() + HANG_TIMEOUT_S
        while not list(root.glob("*/metrics.csv")):
            if self.process.poll() is not None:
                raise _RunEndedError(self.text())
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, rank 0 first; not their loader workers."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        own = [p for p in found if _is_training(p) and p.environ().get("RANK")]
        top = [p for p in own if p.ppid() not in {o.pid for o in own}]
        return sorted(top, key=lambda p: int(p.environ()["RANK"]))

    def wait(self) -> int:
        """Exit status of the launcher. Fails if a process is left."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        status = self.process.wait(timeout=HANG_TIMEOUT_S)
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive, f"left behind: {alive}"
        return status

    def checkpoints(self) -> list[Path]:
        """The checkpoints of the ends of epochs."""
        return list(self.root.glob("*/checkpoints/epoch=*"))

    def text(self) -> str:
        """Output of all processes so far."""
        self.errors.seek(0)
        return self.errors.read()

    def close(self) -> None:
        """Kill the processes that a failed test left."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        self.errors.close()


def _is_training(process: psutil.Process) -> bool:
    """Whether this is a rank or a loader worker: no resource tracker, and no process that has just ended."""
    with contextlib.suppress(psutil.Error):
        return "pretrain_main.py" in " ".join(process.cmdline())
    return False


_LONG = ("trainer.epochs=1000", "trainer.save_ckpt_freq=1000")


def _suspend_rank(data: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of a run whose rank 1 is suspended after the first epoch.

    A busy machine may start the ranks further apart than the timeout; then the run is repeated with a longer one.
    """
    for seconds in (20, 60, 120):
        root = folder / str(seconds)
        command = _command("devices=2", data, str(root / "run"), *_LONG, f"distributed_timeout_s={seconds}")
        with contextlib.suppress(_RunEndedError), contextlib.closing(_Running(command, root)) as running:
            running.ranks()[1].suspend()
            return running.wait(), running.text()
    raise AssertionError("no run had a first epoch")


@pytest.fixture(scope="module", autouse=True)
def suspended_rank(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Future[tuple[int, str]]]":
    """The result of `_suspend_rank`, which waits for timeouts while the other tests run."""
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(_suspend_rank, data, tmp_path_factory.mktemp("suspended"))


@pytest.fixture
def running(request: pytest.FixtureRequest, data: list[str], tmp_path: Path) -> Iterator[_Running]:
    launcher, *arguments = request.param
    root = tmp_path / "runs"
    command = _command(launcher, data, f"{root}/{RANK_DEPENDENT}", *_LONG, *CONSTANT_LR, *arguments)
    started = _Running(command, root)
    yield started
    started.close()


@pytest.mark.parametrize("running", [("devices=2",), ("torchrun",)], indirect=True)
def test_launcher_makes_one_run_dir_and_sigterm_stops_all_ranks_with_a_checkpoint(
    running: _Running, single_process_loss: float
) -> None:
    _check_one_run_dir(running.root, single_process_loss)
    running.process.send_signal(signal.SIGTERM)
    status = running.wait()
    # torchrun exits with its own status and reports that of the ranks
    expected = INTERRUPTED_EXIT_CODE if "devices=2" in " ".join(running.process.args) else 1
    assert status == expected, running.text()
    assert len(running.checkpoints()) == 1
    assert running.text().count("stopped by a signal") == 1


@pytest.mark.parametrize("running", [("devices=2", "num_workers=1")], indirect=True)
def test_a_dead_loader_worker_ends_all_ranks(running: _Running) -> None:
    (worker,) = [p for p in running.ranks()[1].children() if _is_training(p)]
    worker.kill()
    assert running.wait() == 1
    shown = running.text()
    assert "rank 1 failed first" in shown
    assert shown.count("Traceback (most recent call last)") <= 2  # torch's own chain of two, on one rank
    assert "DataLoader worker" in shown


@pytest.mark.parametrize("running", [("devices=2",)], indirect=True)
def test_a_killed_rank_ends_all_ranks(running: _Running) -> None:
    running.ranks()[1].kill()
    assert running.wait() == 128 + signal.SIGKILL
    assert running.text().count("rank 1 was killed by SIGKILL") == 1


@pytest.mark.parametrize("running", [("torchrun",)], indirect=True)
def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(running: _Running) -> None:
    ranks = running.ranks()
    running.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=HANG_TIMEOUT_S)
    assert not alive
    assert len(running.checkpoints()) == 1


_FAILING = {
    "alike": ("all:nan:late1=1", 1, "rank 0 failed first", "mmdistill: error: loss is nan"),
    "first is 0": ("0:defect:late1=1", 1, "rank 0 failed first", "TypeError: a defect"),
    "first is 1": ("1:defect:late0=1", 1, "rank 1 failed first", "TypeError: a defect"),
    "a worker of 1 dies too": ("1:defect:worker1", 1, "rank 1 failed first", "TypeError: a defect"),
    "1 is suspended": ("all:nan:stop1", 1, "rank 0 failed first", "mmdistill: error: loss is nan"),
    "0 is suspended": ("all:defect:stop0", 1, "rank 1 failed first", "TypeError: a defect"),
    "1 has wrong input": ("1:input:late0=1", 2, "rank 1 failed first", "mmdistill: error: a wrong path"),
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the report of the launcher, and of the ranks their output, exit codes and times, for each case."""
    folder = tmp_path_factory.mktemp("failing")
    cases = [f"{name}:{case}" for name, (case, *_) in _FAILING.items()]
    run_python("-m", "tests.integration.failing_ranks", folder, *cases)
    return folder


@pytest.mark.parametrize("name", _FAILING)
def test_failure_is_reported_once_and_blocks_no_rank(failing: Path, name: str) -> None:
    """Also if a rank fails late or never ends."""
    _, status, first, error = _FAILING[name]
    shown = (failing / f"{name}.log").read_text()
    assert error not in shown, "the launcher reports, not the ranks"
    report = json.loads((failing / f"{name}.json").read_text())
    assert report["status"] == status
    assert report["text"].startswith(f"mmdistill: {first}:\n")
    reported = [line for line in report["text"].splitlines() if line.endswith(("loss is nan", "a defect", "path"))]
    assert reported == [error]
    ends = [end for end in report["ends"] if end[1] is not None]
    assert [code for code, _ in ends] == ([1] if "suspended" in name else [1, status])
    assert max(seconds for _, seconds in ends) < launch.KILL_TIMEOUT_S, shown  # after which the launcher kills them


def test_devices_with_a_sweep_raises(data: list[str], tmp_path: Path) -> None:
    _, script, *arguments = _command("devices=2", data, str(tmp_path / "run"))
    done = run_python(script, "-m", *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}", expect=1)
    assert "use torchrun --nproc_per_node=2 pretrain_main.py -m" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hung_rank_ends_all_ranks(suspended_rank: "Future[tuple[int, str]]") -> None:
    status, text = suspended_rank.result()
    assert status not in (0, INTERRUPTED_EXIT_CODE)
    assert "rank 0 failed first" in text
