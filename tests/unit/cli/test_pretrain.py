"""``mmdistill pretrain`` and ``pretrain_main.py``."""

from typing import Any

import pytest

from mmdistill.cli import pretrain
from mmdistill.config import PretrainConfig


@pytest.mark.parametrize("argv", [None, ["modality=rgb"]])
def test_main_passes_the_config_and_the_arguments(monkeypatch: pytest.MonkeyPatch, argv: list[str] | None) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrain, "run_entrypoint", lambda *args, **options: calls.append({"args": args, **options}))
    assert pretrain.main(argv) == 0
    assert calls == [
        {
            "args": (pretrain.run_pretraining, PretrainConfig),
            "config_name": "config_pretrain",
            "verb": "pretrain",
            "argv": argv,
        }
    ]
