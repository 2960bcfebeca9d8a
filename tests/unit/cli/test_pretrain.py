"""``mmdistill pretrain`` and ``pretrain_main.py``."""

from typing import Any

import pytest

from mmdistill.cli import pretrain
from mmdistill.config import PretrainConfig


def test_a_key_without_equal_sign_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        pretrain.main(["--modality=rgb"])
    assert capsys.readouterr().err == "mmdistill pretrain: error: --modality=rgb: write modality=rgb\n"


@pytest.mark.parametrize("argv", [None, ["modality=rgb"]])
def test_main_passes_the_config_and_the_arguments(monkeypatch: pytest.MonkeyPatch, argv: list[str] | None) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrain, "run_entrypoint", lambda *args, **options: calls.append({"args": args, **options}))
    assert pretrain.main(argv) == 0
    assert calls == [
        {
            "args": (pretrain.run_pretraining, PretrainConfig),
            "config_name": "config_pretrain",
            "usage": pretrain._USAGE,
            "verb": "pretrain",
            "argv": argv,
        }
    ]
