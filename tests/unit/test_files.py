"""Atomic writes: complete or not at all."""

import errno
import os
from pathlib import Path
from unittest.mock import patch

import pytest

from mmdistill.files import WriteError, atomic_open, atomic_write_bytes, rename_directory
from tests.disk_faults import failing_disk, mounted_drive


def test_file_and_folder_are_created(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    atomic_write_bytes(path, b"data")
    assert path.read_bytes() == b"data"
    assert list(path.parent.iterdir()) == [path]


def test_old_content_is_visible_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_open(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_exception_keeps_the_old_content_and_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted_write() -> None:
        with atomic_open(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted_write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("new_command")
def test_file_system_that_does_not_rename_over_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "folder" / "file"
    with mounted_drive():
        for content in (b"first", b"second", b"third"):
            atomic_write_bytes(path, content)
            assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    (record,) = caplog.records
    assert "does not rename over an existing file" in record.getMessage()


def test_previous_file_is_restored_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if source.name.startswith(".tmp-"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    monkeypatch.setattr(os, "replace", refuse_new)
    with pytest.raises(WriteError, match=r"file: not written \(\[Errno 13\] Permission denied\)"):
        atomic_write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _make_folder(folder: Path) -> dict[str, bytes]:
    for name in ("manifest.json", "a/x_states.pt", "a/b", "latest"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return _content(folder)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("full_at", [None, 0, 2, 3])
def test_folder_is_renamed_file_by_file_or_not_at_all(tmp_path: Path, full_at: int | None) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    content, order = _make_folder(source), []
    with mounted_drive():
        rename = os.rename

        def record(old: Path, new: Path) -> None:
            if old.is_file() and source in old.parents:
                if len(order) == full_at:
                    raise OSError(errno.EDQUOT, "Disk quota exceeded")
                order.append(old.name)
            rename(old, new)

        with patch.object(os, "rename", record):
            if full_at is None:
                rename_directory(source, target, last=("_states.pt", "manifest.json"))
            else:
                with pytest.raises(OSError, match="quota"):
                    rename_directory(source, target)
    assert _content(target if full_at is None else source) == content
    assert [path.name for path in tmp_path.iterdir()] == ["target" if full_at is None else "source"]
    if full_at is None:
        assert order == ["b", "latest", "x_states.pt", "manifest.json"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_names_the_file_and_the_space(tmp_path: Path, number: int) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for at in (1, 2):  # the file, the rename
        with failing_disk(at, number), pytest.raises(WriteError, match=r"file: not written \(.*, 2.5 MB needed\)$"):
            atomic_write_bytes(tmp_path / "file", bytes(2_500_000))
        assert (tmp_path / "file").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
