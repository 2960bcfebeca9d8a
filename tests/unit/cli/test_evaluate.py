"""``mmdistill evaluate``."""

from typing import Any

import pytest

from mmdistill.cli import evaluate


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
