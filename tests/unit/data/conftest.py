"""Fixtures of the data tests."""

from pathlib import Path

import pytest

from tests.synthetic_dots import DotWorld, write_dot


@pytest.fixture
def dot(tmp_path: Path) -> DotWorld:
    return write_dot(tmp_path)
