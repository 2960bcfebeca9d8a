"""``mmdistill evaluate``."""

from typing import Any

import pytest

from mmdistill.cli import evaluate
from tests.commands import run_python


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["ckpt_path=a"], ["train=False", "test=True", "ckpt_path=a"]),
        (
            ["--config-name=c", "ckpt_path=a", "-m"],
            ["--config-name=c", "train=False", "test=True", "ckpt_path=a", "-m"],
        ),
    ],
)
def test_presets_precede_the_given_overrides(
    monkeypatch: pytest.MonkeyPatch, given: list[str], passed: list[str]
) -> None:
    received: list[Any] = []
    monkeypatch.setattr(evaluate, "run_entrypoint", lambda *_, verb, argv, **__: received.append((verb, argv)))
    assert evaluate.main(given) == 0
    assert received == [("evaluate", passed)]


def test_help_and_errors_name_the_verb_and_the_required_key() -> None:
    shown = run_python("-m", "mmdistill", "evaluate", "--help").stdout
    assert shown.startswith("usage: mmdistill evaluate ckpt_path=PATH ")
    assert "ckpt_path is required" in shown
    assert "mmdistill distill" not in shown
    shown = run_python("-m", "mmdistill", "evaluate", expect=2).stderr
    assert shown.endswith(
        "mmdistill evaluate: error: train=False test=True needs ckpt_path=PATH, the checkpoint to evaluate\n"
    )
