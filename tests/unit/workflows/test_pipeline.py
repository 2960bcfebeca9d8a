"""A second `make demo` does what is missing, and takes nothing for done that another config or version made."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from mmdistill.training import run_metadata as runinfo
from mmdistill.workflows import pipeline as stages
from mmdistill.workflows.pipeline import Stage, StageError, done_already, method_stages, run_stages

SHORT = ("trainer.epochs=1", "trainer.warmup_epochs=0")


def _ended(stage: Stage, needs: dict[str, str] | None = None) -> None:
    """As if it had run: what the entrypoints and `run_stages` leave behind."""
    runinfo.record_run(stage.run_dir, stage.config(), processes=1, accelerator="cpu")
    stage.mark_done(1.0, needs or {})


def _pretraining(output: Path, *more: str, name: str = "pretrain rgb") -> Stage:
    return Stage(name, "pretrain_main.py", ("modality=rgb", "seed=0", *more), output / "pretrain_rgb")


def _edit(stage: Stage, **new: object) -> None:
    """Change the record of the run's first start."""
    path = stage.run_dir / "run.json"
    records = json.loads(path.read_text())
    records[0] |= new
    path.write_text(json.dumps(records))


def test_what_the_config_gives_decides(tmp_path: Path) -> None:
    """Not only the overrides: a default of the YAML files that has changed is another run."""
    stage = _pretraining(tmp_path)
    assert done_already([stage]) == []
    _ended(stage)
    assert done_already([stage]) == [stage]
    with pytest.raises(StageError, match=r"pretrain_rgb holds a run with other settings .*trainer.epochs \d+ / 1; tr"):
        done_already([_pretraining(tmp_path, *SHORT)])
    older = stage.config()
    older["trainer"]["lr"] = 0.123
    _edit(stage, config=older)
    with pytest.raises(StageError, match=r"there / now\): trainer.lr 0.123 / .*; move it away"):
        done_already([stage])


def test_a_run_that_has_begun_is_not_gone_on_with_by_other_settings(tmp_path: Path) -> None:
    _ended(_pretraining(tmp_path, *SHORT))
    (tmp_path / "pretrain_rgb" / "done.json").unlink()
    with pytest.raises(StageError, match="other settings"):
        done_already([_pretraining(tmp_path)])
    assert done_already([_pretraining(tmp_path, *SHORT)]) == []


def test_another_version_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = _pretraining(tmp_path)
    _ended(stage)
    monkeypatch.setattr(stages, "__version__", "9.0")
    with pytest.raises(StageError, match=r"pretrain_rgb was made by mmdistill \S+, this is 9\.0"):
        done_already([stage])


def test_a_marker_alone_is_not_enough(tmp_path: Path) -> None:
    stage = _pretraining(tmp_path)
    _ended(stage)
    (stage.run_dir / "run.json").unlink()
    with pytest.raises(StageError, match=r"has no run\.json"):
        done_already([stage])


def test_what_was_made_from_an_earlier_run_is_told(tmp_path: Path) -> None:
    first = _pretraining(tmp_path)
    second = Stage("other", "pretrain_main.py", ("modality=flow",), tmp_path / "other", (first.name,))
    _ended(first)
    _ended(second, {first.name: (first.marker() or {})["finished"]})
    assert done_already([first, second]) == [first, second]
    shutil.rmtree(first.run_dir)
    with pytest.raises(StageError, match="other was made from an earlier run of pretrain rgb; move it away too"):
        done_already([first, second])
    _ended(first)  # done again
    with pytest.raises(StageError, match="an earlier run of pretrain rgb"):
        done_already([first, second])


def test_the_methods_stages_have_configs(tmp_path: Path) -> None:
    made = method_stages(tmp_path, seed=3, rgb_only=True)
    configs = {stage.name: stage.config() for stage in made}
    assert len(configs) == 6
    assert {config["seed"] for config in configs.values()} == {3}
    assert configs["distil rgb only"]["trainer"]["teachers"] == ["rgb"]
    assert configs["evaluate"]["ckpt_path"] == str(tmp_path / "mmdistill" / "checkpoints" / "last.ckpt")


def test_a_second_call_runs_nothing_and_says_whose_code_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real command line around a job of no work."""
    script = tmp_path / "pretrain_main.py"
    script.write_text(
        "from pathlib import Path\n"
        "from mmdistill.cli.entrypoint import run_entrypoint\n"
        "from mmdistill.config import PretrainConfig\n"
        "job = lambda config, run_dir: (Path(run_dir) / f'ran {config.modality}').touch(exist_ok=False)\n"
        "run_entrypoint(job, PretrainConfig, config_name='config_pretrain')\n"
    )
    first = Stage("rgb", str(script), ("modality=rgb",), tmp_path / "rgb")
    second = Stage("flow", str(script), ("modality=flow",), tmp_path / "flow", ("rgb",))
    run_stages([first, second])
    assert (tmp_path / "flow" / "ran flow").exists()
    assert (second.marker() or {})["needs"] == {"rgb": (first.marker() or {})["finished"]}
    assert "by other code" not in capfd.readouterr().out
    _edit(first, git={"commit": "0123456789abcdef", "dirty": True, "changed": ["src/a.py"]})
    run_stages([first, second])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "done already: rgb, flow"
    assert lines[1].startswith("made by other code than this (")
    assert ": rgb by commit 0123456789 with changes; to do one again" in lines[1]
    assert len(lines) == 2


def test_a_failed_run_is_named(tmp_path: Path) -> None:
    script = tmp_path / "pretrain_main.py"
    script.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(StageError, match="rgb ended with status 3"):
        run_stages([Stage("rgb", str(script), ("modality=rgb",), tmp_path / "rgb")])
    assert sys.executable in Stage("rgb", str(script), (), tmp_path).command()
