import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mmdistill.checkpoint import CheckpointError, directory_lock, lock
from mmdistill.checkpoint.lock import run_lock
from mmdistill.files import WriteError
from tests.disk_faults import failing_disk


def test_second_job_is_rejected(tmp_path: Path) -> None:
    with directory_lock(tmp_path):
        with (
            pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* writes checkpoints to this folder"),
            directory_lock(tmp_path),
        ):
            pass
        assert (tmp_path / ".lock").exists()
        with (
            pytest.raises(CheckpointError, match=rf"process {os.getpid()} on .* writes checkpoints"),
            run_lock(tmp_path),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_stale_lock_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lock, no_process = tmp_path / ".lock", int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    lock.write_text(json.dumps({"pid": no_process, "host": socket.gethostname(), "id": "x"}))
    with directory_lock(tmp_path):
        assert int(lock.read_text().splitlines()[0]) == os.getpid()
    assert f"removed the lock of process {no_process}" in caplog.text
    reused_pid = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": "1",
        "id": "x",
    }  # started at another time
    lock.write_text(json.dumps(reused_pid))
    with directory_lock(tmp_path):
        pass
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "id": "x"}))
    with pytest.raises(CheckpointError, match="process 1 on elsewhere"), directory_lock(tmp_path):
        pass
    lock.write_text("{")
    with pytest.raises(CheckpointError, match="unreadable lock"), directory_lock(tmp_path):
        pass


def test_lock_of_a_killed_process_is_taken_over_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    enter = f"lock = directory_lock({str(tmp_path)!r}); lock.__enter__()"
    code = f"import os; from mmdistill.checkpoint import directory_lock; {enter}; os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    pid = int((tmp_path / ".lock").read_text().splitlines()[0])
    monkeypatch.delattr(os, "link")
    with directory_lock(tmp_path):
        assert int((tmp_path / ".lock").read_text().splitlines()[0]) == os.getpid()
    assert f"removed the lock of process {pid}, which has ended" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_lock_of_another_job_is_not_removed_at_the_end(tmp_path: Path) -> None:
    """An administrator deleted the lock, and another job started before this one ended."""
    with directory_lock(tmp_path):
        (tmp_path / ".lock").unlink()
        (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "id": "other"}))
    assert json.loads((tmp_path / ".lock").read_text())["id"] == "other"


def test_run_lock_is_held_by_rank_0_and_released_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.suppress(RuntimeError), run_lock(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
        raise RuntimeError
    assert list((tmp_path / "run").iterdir()) == []
    monkeypatch.setattr("mmdistill.checkpoint.lock.get_rank", lambda: 1)
    with run_lock(tmp_path / "other"):
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_read_only_folder_or_full_disk_is_one_line(tmp_path: Path, number: int) -> None:
    with (
        failing_disk(0, number),
        pytest.raises(WriteError, match=rf"\.lock: not written \(\[Errno {number}\] "),
        directory_lock(tmp_path / "new"),
    ):
        pytest.fail("locked")


def test_end_of_a_process_where_the_system_has_no_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, **_: object) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert not lock._has_ended(os.getpid(), "1")  # unknown, so the lock is kept
    assert lock._has_ended(2**22 + 1, "1")  # more than the largest process id
