"""Atomic writes: complete or not at all."""

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mmdistill import files
from mmdistill.errors import InputError
from mmdistill.files import (
    WriteError,
    atomic_open,
    atomic_write_bytes,
    encode_json,
    record_process,
    remove_temporary_files,
    remove_temporary_folders,
    rename_directory,
    require_utf8_name,
    temporary_folder,
)
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


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".tmp-1234-metrics.csv", "metrics.csv", ".tmp-notes"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-notes", "metrics.csv"]


def test_next_write_to_a_folder_removes_the_file_of_a_killed_process(tmp_path: Path) -> None:
    def write_and_kill() -> None:
        with atomic_open(tmp_path / "report.html"):
            os.kill(os.getpid(), signal.SIGKILL)

    if os.fork() == 0:
        write_and_kill()
    os.wait()
    (left,) = tmp_path.iterdir()
    of_another_machine = tmp_path / ".tmp-0-000000-report.html"
    for path in (of_another_machine, tmp_path / ".tmp-notes", tmp_path / left.name.replace("tmp-", "tmp-x")):
        path.touch()
    with atomic_open(tmp_path / "of_this_process"):
        atomic_write_bytes(tmp_path / "report.html", b"")
    assert not left.exists()
    assert of_another_machine.exists()
    assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folder_is_removed_at_the_end(root: Path) -> None:
    with temporary_folder() as folder:
        assert Path(folder).parent == root
        Path(folder, "file").touch()
    assert not Path(folder).exists()


def test_folder_of_a_killed_process_is_removed_by_the_next_command(root: Path) -> None:
    if os.fork() == 0:
        with temporary_folder():
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    assert len(list(root.iterdir())) == 2  # the folder and its lock
    with temporary_folder() as folder:
        assert {str(path) for path in root.iterdir()} == {folder, f"{folder}.lock"}
    assert not list(root.iterdir())


@pytest.mark.parametrize(("module", "function"), [(fcntl, "flock"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink")])
def test_nothing_remains_of_a_process_that_is_killed_at_any_moment(root: Path, module: Any, function: str) -> None:
    if os.fork() == 0:
        with patch.object(module, function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)), temporary_folder():
            pass
        os._exit(0)
    assert os.wait()[1] == signal.SIGKILL
    assert list(root.iterdir())
    remove_temporary_folders(root)
    assert not list(root.iterdir())


def test_shared_memory_of_a_killed_process_is_removed_with_its_folder(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL between torch's creation of a name and its removal."""
    memory = tmp_path_factory.mktemp("shm")
    monkeypatch.setattr(files, "_SHARED_MEMORY", memory)
    if (pid := os.fork()) == 0:
        with temporary_folder() as folder:
            record_process(Path(folder))
            (memory / f"torch_{os.getpid()}_1_2").touch()
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    for other in (f"torch_{os.getpid()}_1_2", f"torch_{pid}0_1_2"):
        (memory / other).touch()
    assert len(list(memory.iterdir())) == 3
    with temporary_folder() as folder:
        record_process(Path(folder))
    assert {path.name for path in memory.iterdir()} == {f"torch_{os.getpid()}_1_2", f"torch_{pid}0_1_2"}
    assert not list(root.iterdir())


def test_lock_that_another_process_removes_before_it_is_locked_is_replaced(root: Path) -> None:
    flock, calls = fcntl.flock, []

    def remove_first(lock: int, operation: int) -> None:
        calls.append(lock)
        if len(calls) == 1:
            remove_temporary_folders(root)
        flock(lock, operation)

    with patch.object(fcntl, "flock", remove_first), temporary_folder() as folder:
        remove_temporary_folders(root)
        assert {str(path) for path in root.iterdir()} == {folder, f"{folder}.lock"}


def test_folder_of_a_killed_process_stays_while_its_worker_uses_it(root: Path) -> None:
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        with temporary_folder():
            os.close(write_end)
            worker = multiprocessing.get_context("fork").Process(target=os.read, args=(read_end, 1))
            worker.start()
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    (left,) = [path for path in root.iterdir() if path.is_dir()]
    with temporary_folder():
        assert left.is_dir()
    os.close(write_end)  # ends the worker
    for _ in range(1000):
        with temporary_folder():
            if not left.exists():
                return
        time.sleep(0.01)
    raise AssertionError(f"{left} remains")


def test_folder_in_use_stays(root: Path) -> None:
    with temporary_folder() as folder:
        with temporary_folder() as other:
            assert folder != other
        assert Path(folder).is_dir()


def test_fork_that_ends_the_block_does_not_remove_the_folder(root: Path) -> None:
    with temporary_folder() as folder:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            assert Path(folder).is_dir()
    if not pid:
        os._exit(0)
    assert not Path(folder).exists()


def test_folders_of_other_programs_stay(root: Path) -> None:
    (root / "mmdistill-other").mkdir()
    (root / "mmdistill-file").touch()
    with temporary_folder():
        assert (root / "mmdistill-other").is_dir()
        assert (root / "mmdistill-file").is_file()


def test_json_keeps_bytes_of_names_that_are_not_utf8() -> None:
    content = {"command": [os.fsdecode(b"\xe9t\xe9"), "网球"], "loss": float("inf")}
    data = encode_json(content)
    assert json.loads(data) == content
    assert "网球".encode() in data
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode_json(content, allow_nan=False)


def test_names_that_are_not_utf8_are_rejected(tmp_path: Path) -> None:
    require_utf8_name(tmp_path / "网球")
    with pytest.raises(InputError, match="the name is not UTF-8"):
        require_utf8_name(tmp_path / os.fsdecode(b"\xe9t\xe9") / "last.ckpt")
