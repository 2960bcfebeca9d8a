"""``mmdistill evaluate``."""

from pathlib import Path
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


@pytest.mark.parametrize("name", ["last.ckpt", "epoch=1.ckpt", "runs"])
def test_path_without_its_key_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    for path in (name, str(tmp_path / name)):
        with pytest.raises(SystemExit) as ended:
            evaluate.main(["-m", path, "seed=1"])
        assert ended.value.code == 2
        message = f"mmdistill evaluate: error: {path}: a checkpoint needs its key: ckpt_path={path}\n"
        assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "given", [["--config-dir", "."], ["ckpt_path=.", "--cfg", "job"], ["~trainer"], ["--config-dir=.", "+a=1"]]
)
def test_options_and_their_values_are_no_paths(monkeypatch: pytest.MonkeyPatch, given: list[str]) -> None:
    received: list[Any] = []
    monkeypatch.setattr(evaluate, "run_entrypoint", lambda *_, argv, **__: received.append(argv))
    assert evaluate.main(given) == 0
    assert len(received) == 1
