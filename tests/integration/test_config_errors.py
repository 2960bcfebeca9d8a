"""Invalid keys on a real command line: one line, exit status 2, no traceback."""

from pathlib import Path

import pytest

from tests.commands import run_python


def error_of(*arguments: str) -> str:
    """Standard error of a pretraining that ends because of its config."""
    shown = run_python("pretrain_main.py", *arguments, expect=2).stderr
    assert "Traceback" not in shown
    return shown


def test_misspelled_keys_fail_on_the_command_line_and_in_yaml(tmp_path: Path) -> None:
    shown = error_of("modality=rgb", "trainer.epcohs=3")
    assert "epcohs" in shown
    assert "trainer.epochs" in shown
    (tmp_path / "bad.yaml").write_text("defaults:\n  - config_pretrain\n  - _self_\ntrainer:\n  epcohs: 3\n")
    assert "epcohs" in error_of(f"--config-dir={tmp_path}", "--config-name=bad", "modality=rgb")
    assert "trainer.epochs" in error_of("modality=rgb", "trainer.epochs=three")


def test_renamed_keys_name_their_replacement(tmp_path: Path) -> None:
    message = "data_module.missing was renamed to data_module.on_missing"
    assert error_of("modality=rgb", "data_module.missing=skip").endswith(f"mmdistill pretrain: error: {message}\n")
    (tmp_path / "old.yaml").write_text("defaults:\n  - config_pretrain\n  - _self_\ndata_module:\n  missing: skip\n")
    shown = error_of(f"--config-dir={tmp_path}", "--config-name=old", "modality=rgb")
    assert shown.endswith(f"mmdistill pretrain: error: old: {message}\n")
    (tmp_path / "old.yaml").write_text("defaults:\n  - config_pretrain\n  - deepspeed: zero2\n  - _self_\n")
    shown = error_of(f"--config-dir={tmp_path}", "--config-name=old", "modality=rgb")
    assert "deepspeed was removed; use strategy=deepspeed_stage_N" in shown


def test_help_and_validation_import_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['pretrain_main.py', '--help']\n"
        "try:\n    runpy.run_path('pretrain_main.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    assert "target_data_dir" in run_python("-c", code).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "modality=rgb", "resume=Auto"], "resume=Auto: there is no such path; did you mean auto?"),
        (["pretrain", "modality=rgb", "init_from=nope.pth"], "init_from: nope.pth: does not exist"),
        (["distill", "trainer.ckpt_path=[a,b,c]", "resume=Auto"], "resume=Auto: there is no such path"),
        (["distill", "trainer.ckpt_path=[a,b,c]"], "trainer.ckpt_path: a: does not exist"),
        (["evaluate", "ckpt_path=nope.ckpt"], "ckpt_path: nope.ckpt: does not exist"),
        (["features", "nope.ckpt", "out.npz"], "nope.ckpt: does not exist"),
    ],
)
def test_missing_paths_are_reported_before_demo_data_are_rendered(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run_python("-m", "mmdistill", *arguments, cwd=tmp_path, expect=2)
    assert message in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == []
