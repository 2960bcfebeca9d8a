"""A second `make demo` runs only the missing stages and rejects stages of another config or version."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from mmdistill.training.run_metadata import record_run
from mmdistill.workflows import pipeline
from mmdistill.workflows.pipeline import Stage, StageError, completed_stages, method_stages, run_stages

SHORT = ("trainer.epochs=1", "trainer.warmup_epochs=0")


def _complete(stage: Stage, needs: dict[str, str] | None = None) -> None:
    """Write the files that a complete run leaves in its folder."""
    record_run(stage.run_dir, stage.config(), processes=1, accelerator="cpu")
    stage.write_done_record(1.0, needs or {})


def _pretraining(output: Path, *more: str, name: str = "pretrain rgb") -> Stage:
    return Stage(name, "pretrain", ("modality=rgb", "seed=0", *more), output / "pretrain_rgb")


def _edit(stage: Stage, **new: object) -> None:
    """Change the record of the run's first start."""
    path = stage.run_dir / "run.json"
    records = json.loads(path.read_text())
    records[0] |= new
    path.write_text(json.dumps(records))


def test_changed_default_of_a_config_file_is_rejected(tmp_path: Path) -> None:
    """The complete config is compared, not only the overrides."""
    stage = _pretraining(tmp_path)
    assert completed_stages([stage]) == []
    _complete(stage)
    assert completed_stages([stage]) == [stage]
    with pytest.raises(
        StageError, match=r"pretrain_rgb contains a run with other settings .*trainer.epochs \d+ / 1; tr"
    ):
        completed_stages([_pretraining(tmp_path, *SHORT)])
    older = stage.config()
    older["trainer"]["lr"] = 0.123
    _edit(stage, config=older)
    with pytest.raises(StageError, match=r"existing / requested\): trainer.lr 0.123 / .*; move it away"):
        completed_stages([stage])


def test_incomplete_run_with_other_settings_is_rejected(tmp_path: Path) -> None:
    _complete(_pretraining(tmp_path, *SHORT))
    (tmp_path / "pretrain_rgb" / "done.json").unlink()
    with pytest.raises(StageError, match="other settings"):
        completed_stages([_pretraining(tmp_path)])
    assert completed_stages([_pretraining(tmp_path, *SHORT)]) == []


def test_run_of_another_version_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _pretraining(tmp_path)
    _complete(stage)
    monkeypatch.setattr(pipeline, "__version__", "9.0")
    with pytest.raises(StageError, match=r"pretrain_rgb was created by mmdistill \S+, the current version is 9\.0"):
        completed_stages([stage])


def test_done_record_without_run_record_is_rejected(tmp_path: Path) -> None:
    stage = _pretraining(tmp_path)
    _complete(stage)
    (stage.run_dir / "run.json").unlink()
    with pytest.raises(StageError, match=r"has no run\.json"):
        completed_stages([stage])


def test_stage_made_from_an_earlier_run_is_rejected(tmp_path: Path) -> None:
    first = _pretraining(tmp_path)
    second = Stage("other", "pretrain", ("modality=flow",), tmp_path / "other", (first.name,))
    _complete(first)
    _complete(second, {first.name: (first.done_record() or {})["finished"]})
    assert completed_stages([first, second]) == [first, second]
    shutil.rmtree(first.run_dir)
    with pytest.raises(StageError, match="other was created from an earlier run of pretrain rgb; move it away"):
        completed_stages([first, second])
    _complete(first)  # complete again, at a later time
    with pytest.raises(StageError, match="an earlier run of pretrain rgb"):
        completed_stages([first, second])


def test_method_stages_compose(tmp_path: Path) -> None:
    made = method_stages(tmp_path, seed=3, subsets=[("rgb",), ("rgb", "skeleton")])
    configs = {stage.name: stage.config() for stage in made}
    assert len(configs) == 7
    assert {config["seed"] for config in configs.values()} == {3}
    assert configs["distill rgb only"]["trainer"]["teachers"] == ["rgb"]
    assert configs["distill rgb skeleton only"]["trainer"]["teachers"] == ["rgb", "skeleton"]
    pair = next(stage for stage in made if stage.name == "distill rgb skeleton only")
    assert pair.needs == ("pretrain rgb", "pretrain skeleton")
    assert [m for m, _ in pair.teachers] == ["rgb", "skeleton"]
    assert [Path(p).parts[-3] for p in configs["evaluate"]["baselines"][4:]] == [
        "mmdistill_rgb",
        "mmdistill_rgb_skeleton",
    ]
    assert configs["evaluate"]["ckpt_path"] == str(tmp_path / "mmdistill" / "checkpoints" / "last.ckpt")


class _ScriptStage(Stage):
    """A stage whose run is a short Python program instead of a training."""

    program = ""

    def command(self) -> list[str]:
        return [sys.executable, "-c", type(self).program, str(self.run_dir)]


def test_parallel_stages_have_a_log_and_others_print_and_use_all_cores(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "available_cores", lambda: 6)
    program = "import os, sys; os.makedirs(sys.argv[1], exist_ok=True); print('threads', os.environ['OMP_NUM_THREADS'])"
    names = ("rgb", "flow")
    stages = [_script_stage(program, name, tmp_path / name) for name in names]
    stages.append(_script_stage(program, "distill", tmp_path / "distill", *names))
    run_stages(stages, parallel=2)
    lines = capfd.readouterr().out.splitlines()
    logs = [tmp_path / name / "log.txt" for name in names]
    assert lines[:2] == [f"[1/3] rgb: log in {logs[0]}", f"[2/3] flow: log in {logs[1]}"]
    assert lines[4:6] == ["[3/3] distill", "threads 6"]
    assert [log.read_text() for log in logs] == ["threads 3\n"] * 2
    assert not (tmp_path / "distill" / "log.txt").exists()


def _script_stage(program: str, name: str, run_dir: Path, *needs: str) -> Stage:
    kind = type("Program", (_ScriptStage,), {"program": program})
    stage: Stage = kind(name, "pretrain", (f"modality={name}",), run_dir, needs)
    return stage


def test_command_starts_the_verb(tmp_path: Path) -> None:
    command = _pretraining(tmp_path).command()
    assert command[:4] == [sys.executable, "-m", "mmdistill", "pretrain"]
    assert command[-1] == f"hydra.run.dir={tmp_path / 'pretrain_rgb'}"


@pytest.mark.parametrize("parallel", [1, 2])
def test_second_call_runs_nothing_and_names_another_commit(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], parallel: int
) -> None:
    touch = "import os, sys; os.makedirs(sys.argv[1], exist_ok=True); open(sys.argv[1] + '/ran', 'x')"
    first = _script_stage(touch, "rgb", tmp_path / "rgb")
    second = _script_stage(touch, "flow", tmp_path / "flow", "rgb")
    run_stages([first, second], parallel=parallel)
    assert (tmp_path / "flow" / "ran").exists()
    assert (second.done_record() or {})["needs"] == {"rgb": (first.done_record() or {})["finished"]}
    for stage in (first, second):  # the program writes no run.json
        record_run(stage.run_dir, stage.config(), processes=1, accelerator="cpu")
    capfd.readouterr()
    run_stages([first, second])
    assert capfd.readouterr().out.splitlines() == ["already complete: rgb, flow"]
    _edit(first, git={"commit": "0123456789abcdef", "dirty": True, "changed": ["src/a.py"]})
    run_stages([first, second])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "already complete: rgb, flow"
    assert lines[1].startswith("created by a different commit than the current ")
    assert ": rgb by commit 0123456789 with changes; to rerun a stage" in lines[1]
    assert len(lines) == 2


def test_parallel_runs_show_the_last_line_of_their_logs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_PROGRESS_SECONDS", 0.0)
    program = "import sys, time; print('started'); print(f'epoch 3 of {sys.argv[1][-4:]}', flush=True); time.sleep(1)"
    (tmp_path / "pose").mkdir()
    (tmp_path / "pose" / "log.txt").write_text("line of an earlier run\n")
    run_stages([_script_stage(program, name, tmp_path / name) for name in ("flow", "pose")], parallel=2)
    lines = capfd.readouterr().out.splitlines()
    assert lines.count("flow: epoch 3 of flow") == lines.count("pose: epoch 3 of pose") == 1
    assert "started" not in "".join(lines)
    assert "earlier" not in "".join(lines)


def test_sigterm_ends_the_runs(tmp_path: Path) -> None:
    program = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    stage = _script_stage(program, "rgb", tmp_path / "pid")
    main = multiprocessing.get_context("fork").Process(target=run_stages, args=([stage],))
    main.start()
    deadline = time.monotonic() + 60
    while not (stage.run_dir.exists() and stage.run_dir.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = psutil.Process(int(stage.run_dir.read_text()))
    assert main.pid is not None
    os.kill(main.pid, signal.SIGTERM)
    main.join(30)
    assert main.exitcode == 128 + signal.SIGTERM
    assert not child.is_running()


def test_failed_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="rgb failed with exit status 3"):
        run_stages([_script_stage("raise SystemExit(3)", "rgb", tmp_path / "rgb")])


def test_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no stage can start: rgb need stages that are not in the list"):
        run_stages([_script_stage("", "rgb", tmp_path / "rgb", "nothing")])
