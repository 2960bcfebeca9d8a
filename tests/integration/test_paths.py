"""Folders with ``=``, spaces, brackets, commas, quotes, ``~``, emoji and other letters, on the command line."""

import json
import os
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmdistill.config.overrides import quote_overrides
from tests.commands import run_python
from tests.tiny_data import EVAL, MODEL, make_tiny, overrides

ROOT = Path(__file__).resolve().parents[2]
ODD = "a=b [1], c é ü~ 'q' \"网球\" 🎾"


def _quoted(path: Path) -> str:
    """Quoted for Hydra, because the path contains a comma."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _run(script: str, *arguments: object, home: Path) -> str:
    return run_python(ROOT / script if script != "-m" else script, *arguments, cwd=home, env={"HOME": str(home)}).stdout


def test_every_phase_with_odd_and_relative_paths(tmp_path: Path) -> None:
    """The commands run in the odd folder; Hydra changes into the run folder, and ``~`` is the home folder."""
    home = tmp_path / ODD
    home.mkdir()
    (Path.home() / ".cache").mkdir(exist_ok=True)
    (home / ".cache").symlink_to(Path.home() / ".cache")  # DeepSpeed reuses its compiled extensions
    data = overrides(make_tiny(home / "data = 'é' 🎾", per_class=4))
    data = ["data_module.target_data_dir=~/data = 'é' 🎾" if "target_data_dir" in o else o for o in data]
    small = [*data, "trainer.epochs=1", "hydra.job.chdir=true"]
    pretrain = ["modality=rgb", *small, *MODEL, f"hydra.run.dir={_quoted(home / 'pre=1')}"]
    _run("pretrain_main.py", *pretrain, home=home)
    teacher = next((home / "pre=1" / "checkpoints").glob("epoch=00-*")).relative_to(home)
    _run("pretrain_main.py", *pretrain, "trainer.epochs=2", f"resume={teacher}", home=home)
    assert list((home / "pre=1" / "checkpoints").glob("epoch=01-*"))
    run = home / "distill [2]"
    _run(
        "lit_main_mmdistill.py", "trainer.teachers=[rgb]", f"trainer.ckpt_path=[{teacher}]", *small, *EVAL,
        "baselines=[random]", "feature_cache='~/cache, 1'",
        f"hydra.run.dir={_quoted(run)}", home=home,
    )  # fmt: skip
    assert json.loads((run / "fewshot.json").read_text())["network"] == "student_rgb"
    assert list((home / "cache, 1").iterdir())
    printed = json.loads(_run("-m", "mmdistill", "find-checkpoints", home, "--json", home=home))
    distill, evaluate = (shlex.split(printed[verb]) for verb in ("distill", "evaluate"))  # as a shell splits it
    for command, value in ((distill, printed["ckpt_path"][:1]), (evaluate, str(run / "checkpoints" / "last.ckpt"))):
        override = OverridesParser.create().parse_override(quote_overrides(command)[-1])
        assert override.value() == value
    student = f"~/{run.name}/checkpoints/last.ckpt"
    _run(
        "-m", *evaluate, f"ckpt_path={student}", "feature_cache=null", "hydra.job.chdir=true",
        f"hydra.run.dir={_quoted(home / 'test é')}", home=home,
    )  # fmt: skip
    assert (home / "test é" / "report.html").is_file()


@pytest.mark.parametrize(
    "path",
    ["/p/a=b/x.ckpt", "/p/a b/x", "/p/a [1]/x", "/p/x[1].ckpt", "/p/é/x", "~/x.ckpt", "../o=1/x (2) [3].ckpt",
     "/p/it's/x", "/p/a{1}#&/x", "'2' é/x", '"a" b/x'],
)  # fmt: skip
def test_special_characters_need_no_quotes(path: str) -> None:
    """Alone, in a list and in a mapping."""
    parser = OverridesParser.create()
    for value, expected in ((path, path), (f"[{path},~/z]", [path, "~/z"]), (f"{{rgb:{path}}}", {"rgb": path})):
        parsed = parser.parse_override(quote_overrides([f"resume={value}"])[0])
        assert not parsed.is_sweep_override()
        assert parsed.value() == expected


@pytest.mark.parametrize("value", ["range(1,5)", "a,b", "choice(1,2)"])
def test_sweep_values_are_not_quoted(value: str) -> None:
    assert OverridesParser.create().parse_override(quote_overrides([f"seed={value}"])[0]).is_sweep_override()


def test_unquoted_comma_is_explained(tmp_path: Path) -> None:
    done = run_python(ROOT / "pretrain_main.py", "modality=rgb", "resume=/p/a, b/x", cwd=tmp_path, expect=2)
    assert "a comma outside quotes makes a sweep" in done.stderr


def test_run_folder_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    data = overrides(make_tiny(tmp_path / "data", per_class=1))
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    done = run_python(
        ROOT / "pretrain_main.py", "modality=rgb", *data, f"hydra.run.dir={folder}", cwd=tmp_path, expect=2
    )
    assert "\\udce9: the name is not UTF-8, and torch cannot open such files; rename it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not folder.exists()
