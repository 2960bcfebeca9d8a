"""``mmdistill evaluate``."""

import pytest

from mmdistill.cli import distill, evaluate


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        (["ckpt_path=a"], ["train=False", "test=True", "ckpt_path=a"]),
        (
            ["--config-name=c", "ckpt_path=a", "-m"],
            ["--config-name=c", "train=False", "test=True", "ckpt_path=a", "-m"],
        ),
        (["--help"], ["--help", "train=False", "test=True"]),
    ],
)
def test_presets_precede_the_given_overrides(
    monkeypatch: pytest.MonkeyPatch, given: list[str], passed: list[str]
) -> None:
    received: list[list[str]] = []
    monkeypatch.setattr(distill, "main", lambda argv: received.append(argv) or 0)
    assert evaluate.main(given) == 0
    assert received == [passed]
