"""Fixtures of the data tests."""

from pathlib import Path

import pytest

from tests.synthetic_dots import DotVideo, write_dot_video


@pytest.fixture
def dot(tmp_path: Path) -> DotVideo:
    return write_dot_video(tmp_path)
