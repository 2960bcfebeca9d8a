"""Stop signals to the whole process group, as schedulers send them, with loader workers of every start method."""

import signal as signals
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import latest_valid_checkpoint, read_checkpoint
from mmdistill.distributed.launch import INTERRUPTED_EXIT_CODE
from tests.commands import ROOT, TIMEOUT, environment, run_python
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides, write_teacher

SHIM = Path(__file__).with_name("signal_shim.py")
PRETRAIN, DISTILL = "pretrain_main.py", "lit_main_mmdistill.py"
CASES = [  # script, start method, signal, workers
    (PRETRAIN, "fork", "SIGTERM", 0),
    (PRETRAIN, "fork", "SIGTERM", 1),
    (PRETRAIN, "forkserver", "SIGINT", 1),
    (PRETRAIN, "spawn", "SIGUSR1", 1),
    (DISTILL, "spawn", "SIGTERM", 1),
    (DISTILL, "forkserver", "SIGUSR1", 1),
    (DISTILL, "fork", "SIGINT", 4),
]
Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command line of a training of 2 epochs of 9 batches."""
    root = tmp_path_factory.mktemp("signals")
    data = overrides(make_tiny(root / "data"))
    teachers = [str(write_teacher(root / m, m, i)) for i, m in enumerate(("rgb", "flow", "skeleton"))]

    def make(script: str, run_dir: Path, workers: int = 0, *more: str) -> list[str]:
        own = ["modality=flow", *MODEL] if script == PRETRAIN else [f"trainer.ckpt_path=[{','.join(teachers)}]"]
        common = [*data, *EVAL, "accelerator=cpu", f"num_workers={workers}", f"hydra.run.dir={run_dir}"]
        return [script, *own, *(["test=False"] if script == DISTILL else []), *common, *more]

    return make


def run(method: str, signal: str, call: int, command: list[str], *, expect: int) -> str:
    """Run a command under the shim; its standard error."""
    return run_python(SHIM, method, signal, call, *command, expect=expect, cwd=ROOT).stderr


def newest(run_dir: Path) -> Path:
    """The file or directory with the newest weights."""
    last = run_dir / "checkpoints" / "last.ckpt"
    found = last if last.is_file() else latest_valid_checkpoint(run_dir / "checkpoints")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def uninterrupted(command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of both trainings without a signal."""
    runs = {script: tmp_path_factory.mktemp("whole") / "run" for script in (PRETRAIN, DISTILL)}
    for script, run_dir in runs.items():
        run("fork", "SIGTERM", 0, command(script, run_dir), expect=0)
    return runs


@pytest.mark.parametrize(("script", "method", "signal", "workers"), CASES)
def test_training_saves_and_resumes_exactly(
    script: str, method: str, signal: str, workers: int,
    command: Command, uninterrupted: dict[str, Path], tmp_path: Path,
) -> None:  # fmt: skip
    run_dir = tmp_path / "run"
    errors = run(method, signal, 12, command(script, run_dir, workers), expect=INTERRUPTED_EXIT_CODE)
    assert "Traceback" not in errors
    assert newest(run_dir).exists()
    run("fork", signal, 0, command(script, run_dir, workers, "resume=auto"), expect=0)
    own, expected = (read_checkpoint(newest(d)).state_dict for d in (run_dir, uninterrupted[script]))
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


@pytest.mark.parametrize(
    ("method", "signal", "workers"), [("fork", "SIGTERM", 1), ("spawn", "SIGINT", 1), ("fork", "SIGUSR1", 0)]
)
def test_evaluation_exits_with_the_documented_status(
    method: str, signal: str, workers: int, command: Command, uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = f"ckpt_path={newest(uninterrupted[DISTILL])}"
    evaluate = [a for a in command(DISTILL, tmp_path / "test", workers) if not a.startswith(("test=", "trainer.ckpt"))]
    arguments = [*evaluate, "train=False", "test=True", checkpoint, "feature_cache=null"]
    errors = run(method, signal, 2, arguments, expect=INTERRUPTED_EXIT_CODE)
    assert "Traceback" not in errors
    assert "stopped by a signal" in errors
    assert not (tmp_path / "test" / "fewshot.json").exists()


@pytest.mark.parametrize(
    ("signal", "status", "line"), [("SIGUSR1", 85, "stopped by a signal"), ("SIGINT", 130, "inter")]
)
def test_signal_before_the_training_leaves_no_folder(
    signal: str, status: int, line: str, command: Command, tmp_path: Path
) -> None:
    """Schedulers start a job again that ends with 85."""
    run_dir = tmp_path / "run"
    arguments = [sys.executable, *command(PRETRAIN, run_dir)]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signals.signal(signals.SIGINT, signals.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while not (run_dir / ".hydra").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signals.Signals[signal])
    errors = process.communicate(timeout=TIMEOUT)[1].splitlines()
    assert process.returncode == status, errors
    assert len([text for text in errors if line in text]) == 1
    assert not any("Traceback" in text for text in errors)
    assert not run_dir.exists()


def test_stop_while_demo_data_render_prints_no_warning(tmp_path: Path) -> None:
    """A killed process would leave semaphores, which Python's resource tracker reports."""
    code = (
        "from pathlib import Path; from mmdistill.demo.dataset import make_demo; "
        "from mmdistill.demo.scene import DemoParameters; make_demo(Path('data'), DemoParameters(), workers=2)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not list(tmp_path.glob("data/vid_frames_224/*/*.jpg")):
        time.sleep(0.1)
    process.terminate()
    _, shown = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signals.SIGTERM
    assert "resource_tracker" not in shown
