"""Atomic file writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file in the folder of `path` and rename it to `path` at the end of the block.

    Other processes see the old or the complete new file. After an exception the old file is unchanged. The folder is
    created if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes, *, fsync: bool = False) -> None:
    """Write `data` to `path` atomically; see `atomic_open`. With `fsync` it is on disk before the rename."""
    with atomic_open(path) as file:
        file.write(data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
