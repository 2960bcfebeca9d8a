"""For all tests: a module leaves no trace in the environment of the next ones."""

import os
from collections.abc import Iterator

import pytest

from mmdistill import launch
from tests.commands import PLACE


@pytest.fixture(autouse=True, scope="module")
def no_trace() -> Iterator[None]:
    """`start_process` makes the test process a world of one: commands that later tests start must not inherit that."""
    before, solo = {name: os.environ.get(name) for name in PLACE}, launch._solo
    yield
    launch._solo = solo
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
