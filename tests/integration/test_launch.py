"""Real launchers with two processes, and what happens to them: signals, a killed rank, a hung rank, a dead worker."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from mmdistill.config import ConfigError
from mmdistill.config.overrides import add_overrides, quote_overrides
from mmdistill.distributed import launch
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE, resolve_devices, set_env_from_slurm
from tests.commands import environment
from tests.integration.test_resume import teacher
from tests.tiny_data import MODEL, make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ENVIRONMENT = environment(DS_ACCELERATOR="cpu")
ENOUGH = 300.0  # seconds within which everything here has ended, however busy the machine is
LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(launch.free_port())],
    "deepspeed --no_local_rank": [
        *(str(BIN / "deepspeed"), "--num_accelerators", "2", "--no_local_rank"),
        *("--master_port", str(launch.free_port())),
    ],
    "devices=2": [sys.executable],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return overrides(make_tiny(tmp_path_factory.mktemp("tiny") / "data"))


def _command(launcher: str, data: list[str], folder: str, *arguments: str) -> list[str]:
    own = ["devices=2"] if launcher == "devices=2" else []
    common = ["modality=flow", *data, *MODEL, "batch_size=4", "trainer.epochs=1", "accelerator=cpu", *own]
    return [*LAUNCHERS[launcher], "pretrain_main.py", *common, *arguments, f"hydra.run.dir={folder}"]


@pytest.fixture(scope="module")
def alone(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> float:
    """Loss of one process with the same global batch."""
    run = tmp_path_factory.mktemp("alone")
    command = [a for a in _command("devices=2", data, str(run)) if a not in ("devices=2", "batch_size=4")]
    subprocess.run([*command, "batch_size=8"], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=ENOUGH)
    return _loss(run)


def _loss(run: Path) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        return float(next(csv.DictReader(file))["loss"])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_one_folder_and_the_loss_of_one_process(
    launcher: str, data: list[str], alone: float, tmp_path: Path
) -> None:
    folder = f"{tmp_path}/${{now:%S-%f}}"  # each rank would choose another one
    done = subprocess.run(
        _command(launcher, data, folder), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=ENOUGH
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = tmp_path.iterdir()
    assert _loss(run) == pytest.approx(alone, rel=1e-5)
    assert (run / "run.log").read_text().count("epoch 0: loss") == 1
    assert (run / "run.json").is_file()


def _distil(start: list[str], common: list[str], folder: Path, batch: int) -> float:
    """The loss of a distillation, which leaves one folder and one log."""
    command = [*start, *common, f"batch_size={batch}", f"hydra.run.dir={folder}/${{now:%S-%f}}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=ENOUGH)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.iterdir()
    assert (run / "run.log").read_text().count("epoch 0: loss") == 1
    with (run / "metrics.csv").open(newline="") as file:
        return float(next(csv.DictReader(file))["train_loss"])


def test_launchers_distil_as_one_process_does(data: list[str], tmp_path: Path) -> None:
    given = [str(teacher(tmp_path / m, m, i)) for i, m in enumerate(("rgb", "flow", "skeleton"))]
    common = ["lit_main_mmdistill.py", f"trainer.ckpt_path=[{','.join(given)}]", *data, "trainer.epochs=1"]
    common += ["test=False", "accelerator=cpu"]
    alone = _distil([sys.executable], common, tmp_path / "one", 8)
    for launcher in ("torchrun", "deepspeed --no_local_rank"):
        assert _distil(LAUNCHERS[launcher], common, tmp_path / launcher, 4) == pytest.approx(alone, rel=1e-5)


class _Ended(Exception):
    """A run ended before its first epoch did."""


class _Running:
    """A run of two ranks in the background, its processes found by its folder, which all their commands name."""

    def __init__(self, command: list[str], run: Path) -> None:
        self.run = run
        self.errors = run.with_name(run.name + ".err").open("a+")
        self.process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=self.errors, stderr=self.errors)
        deadline = time.monotonic() + ENOUGH
        while not (run / "metrics.csv").exists():
            if self.process.poll() is not None:
                raise _Ended(self.text())
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        """The training processes, rank 0 first."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        own = [p for p in found if _trains(p) and p.environ().get("RANK")]
        top = [p for p in own if p.ppid() not in {o.pid for o in own}]
        return sorted(top, key=lambda p: int(p.environ()["RANK"]))

    def wait(self) -> int:
        """The exit status; afterwards nobody is left."""
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        status = self.process.wait(timeout=ENOUGH)
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive, f"left behind: {alive}"
        return status

    def text(self) -> str:
        """What it printed."""
        self.errors.seek(0)
        return self.errors.read()

    def close(self) -> None:
        """Kill whatever a failed test left."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()
            self.process.wait()
        self.errors.close()


def _trains(process: psutil.Process) -> bool:
    """Whether this is a rank or a loader's worker: no resource tracker, and nothing that has just ended."""
    with contextlib.suppress(psutil.Error):
        return "pretrain_main.py" in " ".join(process.cmdline())
    return False


_LONG = ("trainer.epochs=1000", "trainer.save_ckpt_freq=1000")


@pytest.fixture
def running(request: pytest.FixtureRequest, data: list[str], tmp_path: Path) -> Iterator[_Running]:
    launcher, *arguments = request.param
    run = tmp_path / "run"
    started = _Running(_command(launcher, data, str(run), *_LONG, *arguments), run)
    yield started
    started.close()


@pytest.mark.parametrize("running", [("devices=2",), ("torchrun",)], indirect=True)
def test_sigterm_to_the_launcher_stops_all_ranks_with_a_checkpoint(running: _Running) -> None:
    running.process.send_signal(signal.SIGTERM)
    status = running.wait()
    # torchrun has an exit status of its own; its ranks' is in its report
    expected = INTERRUPTED_EXIT_CODE if "devices=2" in " ".join(running.process.args) else 1
    assert status == expected, running.text()
    assert len(list((running.run / "checkpoints").glob("epoch=*"))) == 1
    assert running.text().count("stopped by a signal") == 1


@pytest.mark.parametrize("running", [("devices=2", "num_workers=1")], indirect=True)
def test_a_dead_loader_worker_ends_all_ranks(running: _Running) -> None:
    (worker,) = [p for p in running.ranks()[1].children() if _trains(p)]
    worker.kill()
    assert running.wait() == 1
    shown = running.text()
    assert "rank 1 failed first" in shown
    assert shown.count("Traceback (most recent call last)") <= 2  # torch's own chain of two, on one rank
    assert "DataLoader worker" in shown


def test_a_hung_rank_ends_all_ranks(data: list[str], tmp_path: Path) -> None:
    """Seen after as long as ranks wait; on a machine so busy that they start further apart than that, the next try."""
    for seconds in (8, 40, 120):
        run = tmp_path / str(seconds)
        command = _command("devices=2", data, str(run), *_LONG, f"distributed_timeout_s={seconds}")
        with contextlib.suppress(_Ended), contextlib.closing(_Running(command, run)) as running:
            running.ranks()[1].suspend()
            assert running.wait() not in (0, INTERRUPTED_EXIT_CODE)
            assert "rank 0 failed first" in running.text()
            return
    pytest.fail("no run had a first epoch")


@pytest.mark.parametrize("running", [("devices=2",)], indirect=True)
def test_a_killed_rank_ends_all_ranks(running: _Running) -> None:
    running.ranks()[1].kill()
    assert running.wait() == 128 + signal.SIGKILL
    assert running.text().count("rank 1 was ended by SIGKILL") == 1


@pytest.mark.parametrize("running", [("torchrun",)], indirect=True)
def test_ranks_whose_launcher_was_killed_stop_with_a_checkpoint(running: _Running) -> None:
    ranks = running.ranks()
    running.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=ENOUGH)
    assert not alive
    assert len(list((running.run / "checkpoints").glob("epoch=*"))) == 1


_FAILING = {
    "alike": ("all:nan:bound=60,late1=1", "mmdistill: error: loss is nan"),
    "alike but too late": ("all:nan:bound=1,late1=4", "mmdistill: error: loss is nan"),
    "first is 0": ("0:defect:bound=60,late1=1", "[rank0]: TypeError: a defect"),
    "first is 1": ("1:defect:bound=60,late0=1", "[rank1]: TypeError: a defect"),
    "a worker of 1 dies too": ("1:defect:bound=60,worker1", "[rank1]: TypeError: a defect"),
    "1 is suspended": ("all:nan:bound=1,stop1", "mmdistill: error: loss is nan"),
    "0 is suspended": ("all:defect:bound=1,stop0,late1=1", "mmdistill: rank 1: connection to other ranks lost: TypeError: a defect"),
}


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks of each case said, when they ended and how."""
    folder = tmp_path_factory.mktemp("failing")
    cases = [f"{name}:{case}" for name, (case, _) in _FAILING.items()]
    subprocess.run(
        [sys.executable, "-m", "tests.integration.failing_ranks", str(folder), *cases],
        cwd=ROOT,
        env=ENVIRONMENT,
        check=True,
        timeout=ENOUGH,
    )
    return folder


@pytest.mark.parametrize("name", _FAILING)
def test_a_failure_is_told_once_and_holds_nobody(failing: Path, name: str) -> None:
    """However late a rank asks whose failure it is, and whether or not it ever does."""
    shown = (failing / f"{name}.log").read_text()
    told = [line for line in shown.splitlines() if line.endswith(("loss is nan", "a defect"))]
    assert told == [_FAILING[name][1]], shown
    assert "connection to other ranks lost" not in shown or name == "0 is suspended"
    ends = [end for end in json.loads((failing / f"{name}.json").read_text()) if end[1] is not None]
    assert [code for code, _ in ends] == [1] * (1 if "suspended" in name else 2)
    assert max(seconds for _, seconds in ends) < launch._GRACE, shown  # then the launcher would kill


@pytest.mark.parametrize(
    ("ranks", "ended", "status"),
    [
        (("pass", "time.sleep(0.3)"), (), 0),
        (("time.sleep(100)", "sys.exit(3)"), (), 3),  # the first one hangs: it is not waited for
        (("sys.exit(1)", "os.kill(os.getpid(), 9)"), (1,), 137),  # the first fails because of the second
        (("sys.exit(1)", "os.kill(os.getpid(), 9)"), (1, 0), 137),
        (("sys.exit(85)", "time.sleep(1); sys.exit(85)"), (0,), 85),
    ],
)
def test_the_launcher_waits_for_all_but_not_for_ever(
    ranks: tuple[str, str], ended: tuple[int, ...], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in `ended` have ended, in this order, before any other starts and before the launcher looks."""
    monkeypatch.setattr(launch, "_GRACE", 2.0)
    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in (*ended, *(r for r in range(2) if r not in ended)):
            started[rank] = subprocess.Popen([sys.executable, "-c", f"import os, sys, time; {ranks[rank]}"])
            if rank in ended:
                os.waitid(os.P_PID, started[rank].pid, os.WEXITED | os.WNOWAIT)  # its status stays to be read
        assert launch._wait([started[rank] for rank in range(2)]) == status
    finally:
        for process in started.values():
            process.kill()
            process.wait()


def test_ports_are_free_and_below_those_of_connections() -> None:
    ports = {launch.free_port() for _ in range(20)}
    assert max(ports) < 32768
    with socket.socket() as held, pytest.MonkeyPatch.context() as patch:
        held.bind(("127.0.0.1", ports.pop()))
        patch.setattr(launch, "_PORTS", range(held.getsockname()[1], held.getsockname()[1] + 1))
        with pytest.raises(ConfigError, match="in use"):
            launch.free_port()


def test_the_time_to_wait_is_that_of_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed makes groups of its own; without a time they would wait for a hung rank for half an hour."""
    import torch

    from mmdistill.distributed.process import start_process

    core = torch.distributed.distributed_c10d
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(core, name, getattr(core, name))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    start_process(accelerator="cpu", seed=0, timeout_s=77)
    assert core._get_default_timeout("gloo") == timedelta(seconds=77)


def test_slurm_variables_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what set_env_from_slurm sets
        monkeypatch.delenv(name)
    slurm = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_TASKS_PER_NODE": "4(x2)", "JOB_ID": "12345"}
    for name, value in {**slurm, "STEP_NODELIST": "gpu[003-004],login"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    set_env_from_slurm()
    assert [os.environ[n] for n in names] == ["5", "8", "1", "4", "gpu003", "32345"]


def test_devices_as_lightnings_users_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "_single_process", False)
    assert resolve_devices(1, "cpu") == (1, None)
    assert resolve_devices(3, "cpu") == (3, None)
    assert resolve_devices("auto", "cpu") == (1, None)
    assert resolve_devices([2, 3], "gpu") == (2, [2, 3])
    for wrong in (0, "two", [], [True], -2):
        with pytest.raises(ConfigError, match="devices="):
            resolve_devices(wrong, "auto")
    with pytest.raises(ConfigError, match="accelerator=cpu"):
        resolve_devices([0], "cpu")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert resolve_devices(2, "cpu") == (1, None)
    with pytest.raises(ConfigError, match="launcher started 2"):
        resolve_devices(4, "cpu")


def test_local_rank_is_dropped_in_each_spelling() -> None:
    for given in (["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"], ["--local-rank", "1"]):
        assert quote_overrides(["a=1", *given, "b=2"]) == ["a=1", "b=2"]


def test_added_overrides_stay_with_the_others() -> None:
    assert add_overrides(["--config-name", "x", "a=1", "-m"], ["b=2"]) == ["--config-name", "x", "a=1", "b=2", "-m"]
    assert add_overrides(["-m", "a=1"], ["b=2"]) == ["-m", "a=1", "b=2"]
    assert add_overrides(["--config-name=x"], ["b=2"]) == ["--config-name=x", "b=2"]


def test_devices_with_a_sweep_is_refused(data: list[str], tmp_path: Path) -> None:
    command = _command("devices=2", data, str(tmp_path / "run"))
    command = [*command[:2], "-m", *command[2:], f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=ENOUGH)
    assert done.returncode != 0
    assert "use torchrun --nproc_per_node=2 pretrain_main.py -m" in done.stderr
    assert "Traceback" not in done.stderr
