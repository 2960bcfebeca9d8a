import contextlib
import errno
import logging
import os
import stat
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import save_safetensors, write
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.write import (
    DirectFile,
    fsync_path,
    load_torch,
    publish_directory,
    recover_interrupted_saves,
    remove_quietly,
    save_torch,
    warn_if_unsynced,
    write_bytes,
    write_directory,
)
from tests.disk_faults import failing_disk


def test_direct_file_writes_in_pieces_and_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "_WRITEBACK_BYTES", 7)
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(write.os, "posix_fadvise", lambda _, offset, length, advice: started.append((offset, length)))
    file = DirectFile(tmp_path / "x")
    assert file.write(bytes(range(20))) == 20
    file.seek(3)
    file.write(b"abc")
    file.finish()
    file.close()
    assert (tmp_path / "x").read_bytes() == bytes(range(3)) + b"abc" + bytes(range(6, 20))
    assert started == [(0, 7), (7, 7)]


def test_saved_objects_are_loaded(tmp_path: Path) -> None:
    content = {"a": torch.arange(3), "b": {"c": [1, "x", None]}}
    save_torch(content, tmp_path / "sub" / "x.pt")
    loaded = load_torch(tmp_path / "sub" / "x.pt")
    assert torch.equal(loaded["a"], content["a"])
    assert loaded["b"] == content["b"]
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["x.pt"]


def test_error_while_an_object_is_pickled_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        save_torch({"a": lambda: None}, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


def test_complex_tensors_are_not_written_as_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' has dtype torch\.complex64, which safetensors does not support"):
        save_safetensors({"a": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "x.safetensors", {})


def test_write_directory_replaces_the_previous_one(tmp_path: Path) -> None:
    target = tmp_path / "d"
    for name in ("first", "second"):
        write_directory(target, lambda folder, name=name: write_bytes(folder / name, b"x"))
        assert [path.name for path in target.iterdir()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), CheckpointError("x: not saved"), KeyboardInterrupt()])
def test_write_directory_removes_its_files_after_any_error(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        write_bytes(folder / "a", b"x")
        raise error

    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_directory(tmp_path / "d", fail)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_publication_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, staged = tmp_path / "d", tmp_path / ".tmp-d"
    for folder, text in ((target, b"old"), (staged, b"new")):
        folder.mkdir()
        write_bytes(folder / "a", text)
    with monkeypatch.context() as patch:
        real, calls = write.os.rename, []

        def rename_once(source: Path, name: Path) -> None:
            calls.append(source)
            if len(calls) == 2:
                raise KeyboardInterrupt
            real(source, name)

        patch.setattr(write.os, "rename", rename_once)
        with pytest.raises(KeyboardInterrupt):
            publish_directory(staged, target)
    assert not target.exists()
    recover_interrupted_saves(tmp_path)
    assert (target / "a").read_bytes() == b"old"
    publish_directory(staged, target)
    assert (target / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_sync_folders_is_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    sync = os.fsync

    def fail_for_folders(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        sync(handle)

    warn_if_unsynced(tmp_path)
    assert not caplog.records
    monkeypatch.setattr(os, "fsync", fail_for_folders)
    save_torch({"a": torch.ones(2)}, tmp_path / "a.ckpt")
    write_directory(tmp_path / "d", lambda staged: write_bytes(staged / "f", b"x"))
    assert torch.equal(load_torch(tmp_path / "a.ckpt")["a"], torch.ones(2))
    assert (tmp_path / "d" / "f").read_bytes() == b"x"
    warn_if_unsynced(tmp_path)
    (record,) = caplog.records
    assert "this file system cannot sync folders" in record.getMessage()


def test_an_error_of_the_disk_during_a_sync_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="not saved"):
        save_torch({"a": torch.ones(2)}, tmp_path / "a.ckpt")


def test_failure_to_remove_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        remove_quietly(tmp_path / "file")
        remove_quietly(tmp_path / "file")
        assert not caplog.records
        remove_quietly(tmp_path / "file" / "below")
    assert not (tmp_path / "file").exists()


def test_file_is_synced_through_a_handle_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to sync a file that is open for reading."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.write(handle, b"x")))
    (tmp_path / "a").touch()
    assert fsync_path(tmp_path / "a")
    assert synced == [1]


def test_failed_publication_restores_the_previous_directory(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", lambda staged: write_bytes(staged / "f", b"old"))
    for at in range(20):
        with failing_disk(at, errno.EDQUOT) as fault, contextlib.suppress(CheckpointError):
            write_directory(tmp_path / "d", lambda staged: write_bytes(staged / "f", b"new"))
        recover_interrupted_saves(tmp_path)
        is_published = fault.calls.count("rename") == 2 and fault.calls[-1] != "rename"
        assert (tmp_path / "d" / "f").read_bytes() == (b"new" if is_published else b"old")
        assert [path.name for path in tmp_path.iterdir()] == ["d"]
        if not fault.raised:
            return
        if is_published:
            write_directory(tmp_path / "d", lambda staged: write_bytes(staged / "f", b"old"))
    pytest.fail("no save succeeded")
