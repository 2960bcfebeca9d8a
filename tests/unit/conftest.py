"""Fixtures of the unit tests of several packages."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tiny_data import make_tiny

if TYPE_CHECKING:
    from tests.tiny_training import MakeTraining


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny data of 12 clips, which is 4 batches of `make_training`; read-only."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)


@pytest.fixture
def make(tiny_clips: Path, tmp_path: Path) -> "MakeTraining":
    """`make_training` on `tiny_clips`; each call has the same run folder."""
    from tests.tiny_training import make_training  # imports torch, which the controller of pytest-xdist does not need

    return lambda *more, **options: make_training(tiny_clips, tmp_path / "run", *more, **options)


@pytest.fixture
def single_process_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start_process` sets these variables if they are missing; other tests must not see them."""
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for name, value in {**world, "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
