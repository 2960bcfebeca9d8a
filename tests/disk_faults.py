"""A disk that fails: one call that writes raises an error of the operating system."""

import builtins
import ctypes
import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mmdistill.checkpoint import write as writing


class Fault:
    """The calls that wrote so far, by name; the call number `at` (from 0) raises `number`."""

    def __init__(self, at: int, number: int) -> None:
        self.at, self.number = at, number
        self.calls: list[str] = []
        self._writes = 0

    @property
    def raised(self) -> bool:
        """Whether the call `at` was reached."""
        return len(self.calls) > self.at

    def check(self, name: str) -> None:
        """Count a call; of the many writes to a file only every 256th, from the first on."""
        self._writes = self._writes + 1 if name == "write" else 0
        if self._writes % 256 > 1:
            return
        self.calls.append(name)
        if len(self.calls) == self.at + 1:
            raise OSError(self.number, os.strerror(self.number))


@contextmanager
def failing_disk(at: int, number: int = errno.ENOSPC) -> Iterator[Fault]:
    """Let the call number `at` of those that create, write, sync, link or rename files raise `number`."""
    fault = Fault(at, number)

    def counted(owner: Any, name: str, *, writes: Any = lambda *_, **__: True) -> Any:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if writes(*arguments, **options):
                fault.check(name)
            return original(*arguments, **options)

        return patch.object(owner, name, call)

    def is_writing(path: Any, mode: str = "r", *_: Any, **__: Any) -> bool:
        return bool(set(mode) & set("wax+"))

    with (
        counted(builtins, "open", writes=is_writing),
        counted(io, "open", writes=is_writing),
        counted(writing.DirectFile, "__init__"),
        counted(writing.DirectFile, "write"),
        counted(os, "fsync"),
        counted(os, "replace"),
        counted(os, "rename"),
        counted(os, "mkdir"),
        counted(os, "link"),
    ):
        yield fault


def mount_tmpfs(folder: Path, num_kilobytes: int) -> bool:
    """Mount an empty file system in memory of this size on `folder`, for this process only; False if it cannot.

    Call it in a forked process, which has a single thread.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespaces = 0x00020000 | (0 if os.geteuid() == 0 else 0x10000000)  # CLONE_NEWNS, CLONE_NEWUSER
    private = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC
    options = f"size={num_kilobytes}k".encode()
    return (
        libc.unshare(new_namespaces) == 0
        and libc.mount(b"none", b"/", None, private, None) == 0
        and libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, options) == 0
    )


@contextmanager
def mounted_drive(link_error: int = errno.EPERM) -> Iterator[None]:
    """A file system without links and sync of folders, whose times are in steps of 2 s.

    It renames neither over an existing file nor a folder that contains files.
    """
    fsync, rename = os.fsync, os.rename

    def refuse_link(*_: Any, **__: Any) -> None:
        raise OSError(link_error, os.strerror(link_error))

    def fsync_file(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    def rename_to_new_name(source: Any, target: Any, **_: Any) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        if os.path.isdir(source) and os.listdir(source):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(source))
        rename(source, target)
        seconds = int(os.stat(target).st_mtime) // 2 * 2
        os.utime(target, (seconds, seconds))

    with (
        patch.object(os, "link", refuse_link),
        patch.object(os, "fsync", fsync_file),
        patch.object(os, "rename", rename_to_new_name),
        patch.object(os, "replace", rename_to_new_name),
    ):
        yield
