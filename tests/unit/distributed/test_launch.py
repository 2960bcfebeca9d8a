"""Environment of a rank, number of ranks, ports, and whose failure it is. Real launchers: tests/integration."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from mmdistill.config import ConfigError
from mmdistill.distributed import launch
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE, resolve_devices, set_env_from_slurm

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher; what a test sets is removed afterwards."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch, "_single_process", False)


@pytest.fixture
def rank_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


def test_single_process_is_not_launched_externally() -> None:
    assert not launch.launched_externally()
    launch.set_single_process_env()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]
    assert not launch.launched_externally()
    assert not launch.is_nonzero_rank()


def test_rank_of_a_launcher_is_known(rank_one_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.launched_externally()
    assert launch.is_nonzero_rank()
    assert not launch.launcher_exited()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launch.launcher_exited()
    monkeypatch.setenv("RANK", "0")
    assert not launch.is_nonzero_rank()


def set_slurm(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


SLURM = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_TASKS_PER_NODE": "4(x2)", "JOB_ID": "12345"}


def test_slurm_variables_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, **SLURM, STEP_NODELIST="gpu[003-004],login")
    set_env_from_slurm()
    assert [os.environ[name] for name in RANK_VARIABLES] == ["5", "8", "1", "4", "gpu003", "32345"]


def test_variables_of_a_launcher_are_kept(rank_one_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, **SLURM, STEP_NODELIST="a")
    set_env_from_slurm()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")


def test_single_task_of_slurm_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, **{**SLURM, "STEP_NUM_TASKS": "1"})
    set_env_from_slurm()
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[003-005,7],x", "gpu003"), ("a,b", "a"), ("n1", "n1"), ("n[7]", "n7"), ("", "127.0.0.1")]
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert launch._first_host(nodes) == first


def test_free_port_lies_below_the_ephemeral_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {launch.free_port() for _ in range(20)}
    assert max(ports) < 32768
    with socket.socket() as occupied:
        occupied.bind(("127.0.0.1", ports.pop()))
        port = occupied.getsockname()[1]
        monkeypatch.setattr(launch, "_PORTS", range(port, port + 1))
        with pytest.raises(
            ConfigError, match=f"^no free port found: 100 random ports between {port} and {port} are in use"
        ):
            launch.free_port()


@pytest.mark.parametrize(
    ("devices", "accelerator", "expected"),
    [(1, "cpu", (1, None)), (3, "cpu", (3, None)), ("auto", "cpu", (1, None)), (-1, "cpu", (1, None)),
     ([2, 3], "gpu", (2, [2, 3]))],
)  # fmt: skip
def test_devices_select_the_number_of_ranks(devices: Any, accelerator: str, expected: tuple[int, Any]) -> None:
    assert resolve_devices(devices, accelerator) == expected


@pytest.mark.parametrize(("count", "expected"), [(0, 1), (4, 4)])
def test_auto_selects_all_gpus(count: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert resolve_devices("auto", "auto") == (expected, None)


@pytest.mark.parametrize("devices", [0, "two", [], [True], -2, ["0"], [-1]])
def test_invalid_devices_raise(devices: Any) -> None:
    with pytest.raises(ConfigError, match=r"^devices=.* must be a number.*, auto, -1 or a list of GPU numbers$"):
        resolve_devices(devices, "auto")


def test_gpu_numbers_on_cpu_raise() -> None:
    with pytest.raises(ConfigError, match=r"^devices=\[0\] are GPU numbers, but accelerator=cpu; use a number of proc"):
        resolve_devices([0], "cpu")


def test_devices_under_a_launcher_start_nothing(rank_one_of_two: None) -> None:
    for devices in (1, 2, "auto", -1, [0, 1]):
        assert resolve_devices(devices, "auto") == (1, None)
    message = "^devices=4, but the launcher started 2 processes on this machine; remove devices from the command$"
    with pytest.raises(ConfigError, match=message):
        resolve_devices(4, "cpu")


def test_visible_devices_index_those_of_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    launch.set_visible_devices([2, 0])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,4"
    with pytest.raises(ConfigError, match=r"^devices=\[2\], but CUDA_VISIBLE_DEVICES=7,4 has only 2 GPUs$"):
        launch.set_visible_devices([2])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launch.set_visible_devices([1, 3])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"


class Clock(SimpleNamespace):
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        super().__init__(now=0.0)

    def monotonic(self) -> float:
        return float(self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Rank:
    """A process that ends at a time of the clock with an exit code; never if it has none."""

    def __init__(self, clock: Clock, at: float, code: int | None) -> None:
        self.clock, self.at, self.code, self.signals = clock, at, code, [0] * 0

    def poll(self) -> int | None:
        return self.code if self.code is not None and self.clock.now >= self.at else None

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)

    def wait(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the launcher."""
    clock = Clock()
    monkeypatch.setattr(launch, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("ranks", "status", "seconds"),
    [
        ([(0, 0), (0.3, 0)], 0, 0.3),
        ([(0, None), (1, 3)], 3, 1 + launch.SHUTDOWN_TIMEOUT_S),  # rank 0 hangs: it is not waited for
        ([(1, 1), (0, -9)], 137, 1),  # rank 0 fails because rank 1 was killed
        ([(0, 1), (0, -9)], 137, 0),
        ([(0, 85), (60, 85)], 85, 60),  # rank 1 still saves its checkpoint
        ([(0, 85), (0, None)], 85, launch.STOP_TIMEOUT_S),
    ],
)
def test_launcher_waits_for_all_ranks_but_not_forever(
    ranks: list[tuple[float, int | None]], status: int, seconds: float, clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    processes: Any = [Rank(clock, at, code) for at, code in ranks]
    assert launch._wait_for_ranks(processes) == status
    assert clock.now == pytest.approx(seconds, abs=0.2)
    shown = capfd.readouterr().err
    assert shown == ("mmdistill: rank 1 was killed by SIGKILL\n" if status == 137 else "")


def test_ranks_run_the_command_in_one_folder(clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[list[str], dict[str, Any], Rank]] = []

    def popen(command: list[str], **options: Any) -> Rank:
        started.append((command, options, Rank(clock, 1, 0)))
        return started[-1][2]

    sleep = clock.sleep

    def stop(seconds: float) -> None:
        sleep(seconds)
        os.kill(os.getpid(), signal.SIGUSR2)  # the launcher is asked to stop while it waits

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(clock, "sleep", stop)
    monkeypatch.setattr(sys, "argv", ["pretrain_main.py", "modality=rgb", "-m"])
    before = signal.getsignal(signal.SIGUSR2)
    assert launch.spawn_ranks(2, "/run's", cwd=str(tmp_path), program=["-m", "mmdistill"]) == 0
    assert signal.getsignal(signal.SIGUSR2) is before
    for rank, (command, options, process) in enumerate(started):
        expected = [sys.executable, "-m", "mmdistill", "modality=rgb", r"hydra.run.dir='/run\'s'", "-m"]
        assert command == expected
        assert (options["cwd"], options["start_new_session"]) == (str(tmp_path), True)
        own = {name: options["env"][name] for name in RANK_VARIABLES}
        port = own.pop("MASTER_PORT")
        assert own == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
        assert port == started[0][1]["env"]["MASTER_PORT"]
        assert set(process.signals) == {signal.SIGUSR2}


def test_ranks_that_hang_are_killed(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = iter([Rank(clock, 0, None), Rank(clock, 0, 1)])
    kept: list[Rank] = []
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *a, **k: kept.append(next(ranks)) or kept[-1])
    assert launch.spawn_ranks(2, "run", cwd="/", program=["x.py"]) == 1
    assert [rank.signals for rank in kept] == [[signal.SIGKILL], []]


def test_exit_status_of_an_interrupted_run() -> None:
    assert INTERRUPTED_EXIT_CODE == 85


def test_failures_have_no_owner_without_a_process_group() -> None:
    assert launch.claim_first_failure(0) is None
    launch.wait_for_failure_readers(0)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_first_claim_of_a_failure_is_kept(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.claim_first_failure(0) == 0
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert launch.claim_first_failure(0) == 0  # rank 1 is later
    assert launch.claim_first_failure(1) == 1  # another job
    monkeypatch.undo()
    launch.wait_for_failure_readers(0)  # all have read
    assert not dist.is_initialized()


def test_owner_of_a_failure_is_unknown_if_the_store_does_not_answer(
    group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = threading.Event()

    class Store:
        def compare_set(self, key: str, expected: str, value: str) -> str:
            answer.wait()
            raise RuntimeError("connection reset")

    monkeypatch.setattr(launch, "STORE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Store)
    assert launch.claim_first_failure(0) == launch.UNKNOWN_RANK
    answer.set()


def test_rank_zero_waits_for_readers_for_a_limited_time(group: None, clock: Clock) -> None:
    launch.wait_for_failure_readers(0)  # nobody has read
    assert clock.now == pytest.approx(launch.STORE_TIMEOUT_S, abs=0.1)


def test_other_ranks_do_not_wait_for_readers(group: None, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    launch.wait_for_failure_readers(0)
    assert clock.now == 0


def test_exit_is_forced_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    done = threading.Event()
    monkeypatch.setattr(launch, "EXIT_TIMEOUT_S", 0.0)
    monkeypatch.setattr(os, "_exit", lambda status: (ended.append(status), done.set()))
    launch.exit_after_timeout(3)
    assert done.wait(10)
    assert ended == [3]


def test_sigchld_handler_is_removed() -> None:
    before = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    try:
        launch.reset_sigchld_handler()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGCHLD, before)
