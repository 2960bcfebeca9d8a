"""Undo what a refused command has written to its run folder: the records of Hydra and ``run.json``. Imports no torch.

Hydra writes ``.hydra`` before the job starts and checks its input. A command that ends with an error in these checks
must neither change the records of a run that is in the folder nor leave a new folder.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mmdistill.cli.sweep import FINISHED
from mmdistill.distributed import launch
from mmdistill.files import atomic_write_bytes
from mmdistill.workflows.sweep_results import FAILED

HYDRA_DIR = ".hydra"
RECORDS = (*(f"{HYDRA_DIR}/{name}.yaml" for name in ("config", "hydra", "overrides")), "run.json", FAILED, FINISHED)


class RunFolder:
    """A folder before a command writes to it. `records` are the files that each start writes, relative to it."""

    def __init__(self, folder: Path, records: Sequence[str]) -> None:
        self.folder = folder.absolute()
        self._records = [self.folder / name for name in records]
        self._content = {path: path.read_bytes() for path in self._records if path.is_file()}
        self._missing = [path for path in (self.folder, *self.folder.parents) if not path.exists()]  # innermost first
        self._other_files = self._list_other_files()

    def _list_other_files(self) -> dict[str, tuple[int, int] | None]:
        """Time of change and size of all other files in the folder, and None for each folder in it, by name.

        The size also changes within the resolution of the time, which is up to 2 s on some file systems.
        """
        if not self.folder.is_dir():
            return {}
        paths = [path for path in self.folder.iterdir() if path not in self._records]
        own = (HYDRA_DIR, "checkpoints")  # the lock of a run creates the latter
        return {p.name: _state(p) if p.is_file() else None for p in paths if p.name not in own}

    def restore(self) -> None:
        """Restore the records and remove new empty folders, unless the run has started and written other files.

        While another job holds the lock of the folder, the other files are those of that job.
        """
        is_locked = (self.folder / "checkpoints" / ".lock").exists()
        if self._list_other_files() != self._other_files and not is_locked:
            return
        for path in self._records:
            if path not in self._content:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != self._content[path]:
                atomic_write_bytes(path, self._content[path])
        for path in (self.folder / HYDRA_DIR, self.folder / "checkpoints", *self._missing):
            with contextlib.suppress(OSError):  # not empty, or does not exist
                path.rmdir()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


class RunFolderCallback(Callback):
    """Hydra callback that stores the state of the run folder before Hydra writes to it (main configs).

    `RUN` is the folder of the command. `JOBS` are the existing folders of a sweep's jobs.
    """

    RUN: RunFolder | None = None
    JOBS: Sequence[RunFolder] = ()

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Store the state of the run folder."""
        self._store(config, "run")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Store the states of the sweep folder and of the folders of its jobs."""
        self._store(config, "sweep")

    def _store(self, config: DictConfig, mode: str) -> None:
        if launch.is_nonzero_rank():
            return
        with contextlib.suppress(OmegaConfBaseException):  # Hydra reports it
            folder = Path(str(config.hydra[mode].dir))
            log = f"{config.hydra.job.name}.log"
            RunFolderCallback.RUN = RunFolder(folder, [*RECORDS, log] if mode == "run" else ["multirun.yaml"])
            if mode == "sweep":
                RunFolderCallback.JOBS = [RunFolder(path.parent, [*RECORDS, log]) for path in folder.rglob(HYDRA_DIR)]


def restore_folders(*, refused: bool) -> None:
    """Restore the folder of the command if it was `refused`, and those of jobs that a sweep could not start."""
    folders = [*RunFolderCallback.JOBS, *([RunFolderCallback.RUN] if refused and RunFolderCallback.RUN else [])]
    RunFolderCallback.RUN, RunFolderCallback.JOBS = None, ()
    for folder in folders:
        folder.restore()
