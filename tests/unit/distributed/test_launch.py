"""Environment of a rank, number of ranks, and whose failure it is. Real launchers: tests/integration."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from mmdistill.config import ConfigError
from mmdistill.distributed import launch
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE, resolve_devices, set_env_from_slurm

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                  "MMDISTILL_RUN_ID")  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher; what a test sets is removed afterwards."""
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "x")  # so that monkeypatch restores what the code sets
        monkeypatch.delenv(name)


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


SLURM = {"PROCID": "5", "LOCALID": "1", "STEP_NUM_TASKS": "8", "STEP_TASKS_PER_NODE": "4(x2)", "JOB_ID": "12345",
         "STEP_ID": "2"}  # fmt: skip


def test_slurm_variables_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, **SLURM, STEP_NODELIST="gpu[003-004],login")
    set_env_from_slurm()
    port = str(launch._slurm_port(12345, 2))
    run_id = "SLURM job 12345 step 2 restart 0"
    assert [os.environ[name] for name in RANK_VARIABLES] == ["5", "8", "1", "4", "gpu003", port, run_id]


def test_steps_and_jobs_of_slurm_have_different_ports() -> None:
    """Steps of one job, tasks of one array (neighboring job numbers), and special steps such as 4294967290."""
    ports = {launch._slurm_port(job, step) for job in range(7_000_000, 7_000_020) for step in range(20)}
    assert len(ports) == 400
    assert all(1024 < port < 32768 for port in (*ports, launch._slurm_port(1, 4294967290)))


def test_run_id_differs_between_steps_and_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for step, restart in (("0", "0"), ("1", "0"), ("0", "1")):
        set_slurm(monkeypatch, **{**SLURM, "STEP_ID": step, "RESTART_COUNT": restart})
        for name in RANK_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        set_env_from_slurm()
        found.add(launch.get_run_id())
    assert len(found) == 3


def test_run_id_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launch.get_run_id() == ""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    assert launch.get_run_id() == "job7"


def test_variables_of_a_launcher_are_kept(rank_one_of_two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, **SLURM, STEP_NODELIST="a")
    set_env_from_slurm()
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("1", "2")


def test_single_task_of_slurm_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_slurm(monkeypatch, **{**SLURM, "STEP_NUM_TASKS": "1"})
    set_env_from_slurm()
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[003-005,7],x", "gpu003"), ("a,b", "a"), ("n1", "n1"), ("n[7]", "n7"), ("", "127.0.0.1"),
     ("c1-[0-1]n[3,4]", "c1-0n3"), ("n[1-2].cluster", "n1.cluster"), ("[a,b]", "a"),
     ("rack-[01-04]-n[10-12],x", "rack-01-n10"),
     ("a.b.c,n[1-2]", "a.b.c")],
)  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert launch._first_host(nodes) == first


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
    for names in ("GPU-8a6b,GPU-17cd,GPU-93ef", "MIG-1a2b,MIG-3c4d"):  # UUIDs
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        launch.set_visible_devices([1])
        assert os.environ["CUDA_VISIBLE_DEVICES"] == names.split(",")[1]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    launch.set_visible_devices([1, 3])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1,3"


def failure(log_dir: Path, exit_code: int, seconds: float, text: str, status: int | None = None) -> ProcessFailure:
    """What the agent knows about a rank that ended; with `text` also what the rank recorded at its failure."""
    file = str(log_dir / f"{seconds}.json")
    if text:
        moment = 1000 + seconds
        info = {"py_callstack": text, "timestamp": str(int(moment))}
        Path(file).write_text(
            json.dumps(
                {"message": {"message": text, "extraInfo": info}, "time_s": moment, "status": status or exit_code}
            )
        )
    ended = ProcessFailure(local_rank=0, pid=1, exitcode=exit_code, error_file=file)
    ended.timestamp = int(1000 + seconds)
    return ended


@pytest.mark.parametrize(
    ("ranks", "status", "shown"),
    [
        # each rank: exit code, second of its end, text that it recorded, other status that it recorded
        ([(1, 0.9, "lost"), (1, 0.2, "cause")], 1, "mmdistill: rank 1 failed first:\ncause\n"),
        ([(2, 0, "wrong key"), (-15, 0, "")], 2, "mmdistill: rank 0 failed first:\nwrong key\n"),
        ([(1, 0, "lost"), (-9, 1, "")], 137, "mmdistill: rank 1 was killed by SIGKILL\n"),
        ([(-11, 0, ""), (1, 0, "lost")], 139, "mmdistill: rank 0 was killed by SIGSEGV\n"),
        ([(3, 0, "cause"), (-9, 31, "")], 3, "mmdistill: rank 0 failed first:\ncause\n"),  # the agent killed rank 1
        ([(85, 0.1, "stopped"), (-15, 0.2, "")], 85, ""),
        ([(130, 0.1, "interrupted"), (130, 0.2, "interrupted")], 130, "interrupted\n"),
        ([(85, 0.1, "stopped"), (1, 0.2, "lost")], 85, ""),
        ([(-15, 0.1, "stopped", 85), (85, 0.2, "stopped")], 85, ""),  # the agent stopped rank 0 after its record
        ([(-15, 0, ""), (-15, 0, "")], 143, ""),  # before the ranks can handle a signal
        ([(1, 0, ""), (1, 0, "")], 1, ""),  # Python printed the traceback
    ],
)
def test_first_failure_decides(
    ranks: list[Any], status: int, shown: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = {rank: failure(tmp_path, *given) for rank, given in enumerate(ranks)}
    assert launch.report_first_failure(ended) == status
    assert capfd.readouterr().err == shown


def test_ranks_run_the_command_in_one_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The agent passes the arguments on unchanged, and the launcher forwards signals to the ranks."""
    script = tmp_path / "show.py"
    script.write_text(
        "import json, os, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "names = ('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'LOCAL_RANK')\n"
        "def leave(number, frame): sys.exit(7)\n"
        "signal.signal(signal.SIGUSR2, leave)\n"
        "with open(os.path.join(os.path.dirname(__file__), rank), 'w') as file:\n"
        "    json.dump([sys.argv[1:], *(os.environ[n] for n in names)], file)\n"
        "if rank == '0': os.kill(os.getppid(), signal.SIGUSR2)\n"
        "time.sleep(300)\n"
    )
    monkeypatch.setattr(sys, "argv", ["pretrain_main.py", "a=$$x${local_rank}", "-m"])
    before = signal.getsignal(signal.SIGUSR2)
    other_child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    assert launch.run_ranks(2, "/run's", program=[str(script)]) in (7, 128 + signal.SIGUSR2)  # rank 1 may just start
    assert other_child.poll() is None  # it is no rank
    other_child.kill()
    other_child.wait()
    assert signal.getsignal(signal.SIGUSR2) is before
    arguments = ["a=$$x${local_rank}", r"hydra.run.dir='/run\'s'", "-m"]
    assert json.loads((tmp_path / "0").read_text()) == [arguments, "2", "2", "0"]


def test_failure_is_recorded_for_the_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    assert not launch.record_failure("cause", 2)
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "of torchrun")
    assert not launch.record_failure("cause", 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch.RUN_ID)
    assert launch.record_failure("cause", 2)
    shown = str(ChildFailedError("x.py", {1: ProcessFailure(1, 2, 1, str(file))}))  # as torchrun prints it
    assert "cause" in shown


def test_exit_status_of_an_interrupted_run() -> None:
    assert INTERRUPTED_EXIT_CODE == 85


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
