"""Errors and ranks of the Hydra verbs."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.types import RunMode

from mmdistill.cli import entrypoint
from mmdistill.config import ConfigError, PretrainConfig
from mmdistill.config.compose import load_config
from mmdistill.distributed import launch


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
    calls: list[tuple[int, str, str, list[str]]] = []
    _hydra(monkeypatch, tmp_path, RunMode.RUN)
    monkeypatch.setattr(sys, "argv", ["pretrain_main.py"])

    def spawn(count: int, run_dir: str, *, cwd: str, program: list[str]) -> int:
        calls.append((count, run_dir, cwd, program))
        return 3

    monkeypatch.setattr(launch, "spawn_ranks", spawn)
    with pytest.raises(SystemExit) as ended:
        entrypoint.run_or_spawn_ranks(lambda config, run_dir: None, config, verb)
    assert ended.value.code == 3
    program = ["-m", "mmdistill", "pretrain"] if verb else [str(tmp_path / "pretrain_main.py")]
    assert calls == [(2, str(tmp_path / "run"), str(tmp_path), program)]


def test_sweep_with_several_devices_is_rejected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: PretrainConfig
) -> None:
    _hydra(monkeypatch, tmp_path, RunMode.MULTIRUN)
    with pytest.raises(ConfigError, match=r"devices=2 with -m: .* torchrun --nproc_per_node=2"):
        entrypoint.run_or_spawn_ranks(lambda config, run_dir: None, config)


def test_expected_error_of_a_single_process_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        entrypoint.exit_with_error(ConfigError("seed: must be positive"), PretrainConfig, 1, "pretrain")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "mmdistill pretrain: error: seed: must be positive\n"


def test_defect_of_a_single_process_is_raised() -> None:
    with pytest.raises(KeyError):
        entrypoint.exit_with_error(KeyError("defect"), PretrainConfig, 1)


@pytest.mark.parametrize(
    ("error", "line", "first", "expected"),
    [
        (ConfigError("bad key"), "one line", None, ""),  # rank 0 reports it
        (ConfigError("bad key"), "one line", 0, ""),
        (ConfigError("bad key"), "one line", 1, "rank 1 failed first:\none line"),
        (OSError("full"), None, launch.UNKNOWN_RANK, "rank 1: connection to other ranks lost: OSError: full"),
        (FloatingPointError("NaN"), "one line", launch.UNKNOWN_RANK, ""),
        (TypeError("defect"), None, 1, "TypeError: defect"),
    ],
)
def test_rank_reports_its_own_failure_only(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    line: str | None,
    first: int | None,
    expected: str,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    entrypoint.report_rank_failure(error, line, first)
    shown = capsys.readouterr().err
    assert expected in shown
    assert bool(shown) is bool(expected)


def test_frames_of_an_error_are_cleared() -> None:
    def fail() -> None:
        held = [0]
        raise ValueError(len(held))

    try:
        fail()
    except ValueError as error:
        caught = error
    trace = caught.__traceback__
    assert trace is not None
    assert trace.tb_next is not None
    assert "held" in trace.tb_next.tb_frame.f_locals
    entrypoint.release_references(caught)
    assert "held" not in trace.tb_next.tb_frame.f_locals
