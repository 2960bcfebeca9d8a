"""Errors and ranks of the Hydra verbs."""

import errno
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.cli import entrypoint
from mmdistill.cli.run_folder import RunFolder
from mmdistill.config import ConfigError, PretrainConfig
from mmdistill.config.compose import load_config
from mmdistill.distributed import launch
from mmdistill.training.nonfinite import NonFiniteError


@pytest.fixture
def config() -> PretrainConfig:
    return load_config(PretrainConfig, "config_pretrain", ["modality=rgb", "devices=2", "accelerator=cpu"])


def _hydra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: RunMode) -> None:
    runtime = SimpleNamespace(output_dir=str(tmp_path / "run"), cwd=str(tmp_path))
    holder = SimpleNamespace(get=lambda: SimpleNamespace(runtime=runtime, mode=mode))
    monkeypatch.setattr(entrypoint, "HydraConfig", holder)


@pytest.mark.parametrize("verb", ["pretrain", None])
def test_ranks_are_started_with_the_verb_or_the_script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: PretrainConfig, verb: str | None
) -> None:
    calls: list[tuple[int, str, list[str]]] = []
    _hydra(monkeypatch, tmp_path, RunMode.RUN)
    monkeypatch.setattr(sys, "argv", ["pretrain_main.py"])

    def run(count: int, run_dir: str, *, program: list[str]) -> int:
        calls.append((count, run_dir, program))
        return 3

    monkeypatch.setattr(launch, "run_ranks", run)
    with pytest.raises(SystemExit) as ended:
        entrypoint.run_or_spawn_ranks(lambda config, run_dir: None, config, verb)
    assert ended.value.code == 3
    program = ["-m", "mmdistill", "pretrain"] if verb else ["pretrain_main.py"]
    assert calls == [(2, str(tmp_path / "run"), program)]


def test_sweep_with_several_devices_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: PretrainConfig
) -> None:
    _hydra(monkeypatch, tmp_path, RunMode.MULTIRUN)
    with pytest.raises(ConfigError, match=r"devices=2 with -m: .* torchrun --nproc_per_node=2"):
        entrypoint.run_or_spawn_ranks(lambda config, run_dir: None, config)


def test_expected_error_of_a_single_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entrypoint.exit_with_error(ConfigError("seed: must be positive"), PretrainConfig, "pretrain")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "mmdistill pretrain: error: seed: must be positive\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/mnt/run"), "/mnt/run: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/run"), "/mnt/run: Read-only file system"),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "/run: a file was not written ([Errno 122] Disk quota exceeded)",
        ),
    ],
)
def test_full_disk_and_read_only_folder_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: OSError, line: str
) -> None:
    """Errors of files that Hydra or another library writes."""
    monkeypatch.setattr(entrypoint.RunFolderCallback, "RUN", SimpleNamespace(folder="/run"))
    with pytest.raises(SystemExit) as ended:
        entrypoint.exit_with_error(error, PretrainConfig, "pretrain")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"mmdistill pretrain: error: {line}\n"


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_run_folder_that_is_no_folder_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    found = tmp_path / "found"
    if kind == "dangling link":
        found.symlink_to(tmp_path / "not mounted")
    else:
        found.touch()
    folder = found / "x" if kind == "below a file" else found
    monkeypatch.setattr(entrypoint.RunFolderCallback, "RUN", RunFolder(folder, []))
    with pytest.raises(OSError, match=r"exists|Not a directory") as raised:
        folder.mkdir(parents=True, exist_ok=True)  # as Hydra does
    with pytest.raises(SystemExit) as ended:
        entrypoint.exit_with_error(raised.value, PretrainConfig, "pretrain")
    assert ended.value.code == 2
    line = f"hydra.run.dir={folder}: {found} is not a folder; choose another hydra.run.dir"
    assert capsys.readouterr().err == f"mmdistill pretrain: error: {line}\n"


def test_full_disk_in_a_thread_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for error, is_printed in ((OSError(errno.ENOSPC, "No space left on device"), False), (ValueError("defect"), True)):
        entrypoint._report_thread_error(threading.ExceptHookArgs((type(error), error, None, None)))
        assert bool(capsys.readouterr().err) is is_printed


def test_defect_of_a_single_process_is_raised() -> None:
    with pytest.raises(KeyError):
        entrypoint.exit_with_error(KeyError("defect"), PretrainConfig)


@pytest.mark.parametrize(
    ("error", "rank", "in_group", "expected"),
    [
        (ConfigError("bad key"), 0, False, "mmdistill: rank 0 failed:\nmmdistill: error: bad key"),
        (ConfigError("bad key"), 1, False, ""),  # rank 0 reports it
        (ConfigError("no file"), 1, True, "mmdistill: rank 1 failed:\nmmdistill: error: no file"),
        (NonFiniteError("NaN"), 1, True, ""),
        (NonFiniteError("NaN"), 0, True, "mmdistill: error: NaN"),
        (CheckpointError("full").on_all_ranks(), 1, True, ""),
        (CheckpointError("full"), 1, True, "mmdistill: error: full"),
        (TypeError("defect"), 1, True, "TypeError: defect"),
    ],
)
def test_error_of_all_ranks_is_printed_by_rank_zero(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    rank: int,
    in_group: bool,
    expected: str,
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: in_group)
    monkeypatch.setattr(launch, "exit_after_timeout", lambda status: None)
    with pytest.raises(SystemExit) as ended:
        entrypoint.exit_with_error(error, PretrainConfig)
    assert ended.value.code == getattr(error, "exit_status", 1)
    shown = capsys.readouterr().err
    assert expected in shown
    assert bool(shown) is bool(expected)


def _run(monkeypatch: pytest.MonkeyPatch, run_dir: Path, *overrides: str, error: BaseException | None = None) -> None:
    """Run a job that raises `error`."""

    def job(config: PretrainConfig, run_dir: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["mmdistill"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(entrypoint, "run_or_spawn_ranks", lambda job, config, verb=None: job(config, str(run_dir)))
    settings = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    argv = ["modality=rgb", *overrides, f"hydra.run.dir={run_dir}", *settings]
    entrypoint.run_entrypoint(job, PretrainConfig, config_name="config_pretrain", verb="pretrain", argv=argv)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["precision=fp16"], None, "precision=fp16 is not one of auto, 32, bf16, 16; did you mean 16?"),
        ([], ConfigError("a.jpg: no such file"), "a.jpg: no such file"),
    ],
)
def test_expected_error_of_a_job_is_the_only_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    error: Exception | None,
    message: str,
) -> None:
    """Hydra prints "Error executing job with overrides" about an exception that it receives."""
    with pytest.raises(SystemExit) as ended:
        _run(monkeypatch, tmp_path, *overrides, error=error)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"mmdistill pretrain: error: {message}\n"


def test_defect_of_a_job_is_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="defect"):
        _run(monkeypatch, tmp_path, error=KeyError("defect"))


@pytest.mark.parametrize("exists", [True, False])
def test_refused_command_leaves_the_folder_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exists: bool
) -> None:
    run_dir = tmp_path / "date" / "run"
    config = run_dir / ".hydra" / "config.yaml"
    if exists:
        config.parent.mkdir(parents=True)
        config.write_text("earlier")
    with pytest.raises(SystemExit):
        _run(monkeypatch, run_dir, "hydra.output_subdir=.hydra", error=ConfigError("contains checkpoints"))
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["earlier"] * exists
    assert (tmp_path / "date").exists() is exists


def test_ctrl_c_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            _run(monkeypatch, tmp_path / "run", error=KeyboardInterrupt())
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "mmdistill pretrain: interrupted\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rank", "shown"), [(0, "mmdistill distill: interrupted\n"), (1, "")])
def test_ctrl_c_of_several_ranks_is_printed_by_rank_zero(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int, shown: str
) -> None:
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setattr(launch, "exit_after_timeout", lambda status: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as ended:
        entrypoint.exit_after_interrupt("distill")
    assert (ended.value.code, capsys.readouterr().err) == (130, shown)
