"""Hydra sweeps (`-m`): a failed job does not stop the other jobs. Imports no torch.

The folder of a job contains Hydra's ``.hydra/overrides.yaml``, the run's ``metrics.csv`` or ``fewshot.json``, and
``failed.json`` if the job failed.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from mmdistill import __version__
from mmdistill.cli.job_names import FIRST_JOB
from mmdistill.cli.memory import release_memory
from mmdistill.console import program_name
from mmdistill.errors import InputError, MMDistillError, format_count
from mmdistill.files import atomic_write_bytes, encode_json, is_disk_error
from mmdistill.workflows.sweep_results import FAILED, next_job_number, objective

FINISHED = "finished.json"  # record of a finished job in its folder
FAILED_EXIT_CODE = 1  # exit status of a sweep with at least one failed job


def run_job(job: Callable[[], None], run_dir: Path, explain: Callable[[Exception], str]) -> float | None:
    """Run one job of a sweep. An exception is printed and written to ``failed.json``, and the sweep continues.

    The memory of the previous job is released before the job starts.

    With several processes the exception is raised, because a rank that continues alone waits forever for the others.
    `SystemExit`, for example after a stop signal, ends the sweep too. `explain` turns an exception of this package into
    a message.

    Returns:
        `objective` of the job; None after a failure, which Optuna counts as a failed trial.
    """
    release_memory()
    record = run_dir / FAILED
    record.unlink(missing_ok=True)  # may exist from an earlier sweep into this folder
    try:
        job()
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise
        expected = isinstance(error, MMDistillError) or is_disk_error(error)
        line = explain(error) if expected else f"{type(error).__name__}: {error}"
        trace = "" if expected else traceback.format_exc()
        run_dir.mkdir(parents=True, exist_ok=True)
        record.write_bytes(encode_json({"error": line, "traceback": trace}))
        print(
            f"{trace}{program_name()}: job {run_dir.name} failed, the sweep continues: {line}",
            file=sys.stderr,
            flush=True,
        )
        return None
    return objective(run_dir)


def run_unfinished(job: Callable[[], None], run_dir: Path, config: Mapping[str, Any]) -> None:
    """Run a job and write ``finished.json``; with resume=auto skip it if an earlier sweep has finished it.

    `config` is that of the job, as plain values. A job with another config, apart from `resume`, runs again.
    """
    record, content = run_dir / FINISHED, {key: value for key, value in config.items() if key != "resume"}
    text = json.dumps({"mmdistill_version": __version__, "config": content}, indent=1, sort_keys=True, default=str)
    if config.get("resume") == "auto" and record.is_file() and record.read_text(encoding="utf-8") == text:
        print(f"{program_name()}: job {run_dir.name} is already finished, skipping it", file=sys.stderr, flush=True)
        return
    record.unlink(missing_ok=True)
    job()
    atomic_write_bytes(record, text.encode())


def _create_optuna_tables(url: str) -> None:
    """Create the tables of Optuna's storage. With SQLAlchemy 2, Optuna 2.10 does not commit their version itself.

    Raises:
        SystemExit: the storage cannot be opened. Hydra ignores other exceptions of a callback.
    """
    from optuna.storages import RDBStorage

    try:
        RDBStorage(url, engine_kwargs={"isolation_level": "AUTOCOMMIT"})
    except Exception as error:  # of Optuna, SQLAlchemy or a database driver
        reason = str(error).partition("\n")[0]
        line = f"hydra.sweeper.storage={url}: {reason}; use a URL such as sqlite:///optuna.db"
        print(f"{program_name()}: error: {line}", file=sys.stderr)
        raise SystemExit(InputError.exit_status) from error


class SweepFailureCallback(Callback):
    """Hydra callback that ends a sweep with failed jobs with a list of them and status 1 (main configs).

    It reads the job folders, because jobs may run in other processes (joblib, submitit). Hydra ignores every
    `Exception` of a callback, but not `SystemExit`.
    """

    def __init__(self) -> None:
        self._earlier: dict[Path, tuple[int, int]] = {}

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Store the existing records, which belong to another sweep, and the number of the first job.

        A sweeper that chooses values, such as Optuna, continues after the earlier jobs in the folder: the job of the
        same number has other values. Hydra's own sweeper has the same jobs again.
        """
        self._earlier = _failure_records(config)
        has_same_jobs = str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")
        first = 0 if has_same_jobs else next_job_number(Path(str(config.hydra.sweep.dir)))
        os.environ[FIRST_JOB] = str(first)
        if isinstance(storage := config.hydra.sweeper.get("storage"), str):
            _create_optuna_tables(storage)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """List the failed jobs and exit with `FAILED_EXIT_CODE`, if any job failed."""
        failed = [path for path, state in _failure_records(config).items() if self._earlier.get(path) != state]
        if failed:
            lines = [f"  {record.parent}: {json.loads(record.read_bytes())['error']}" for record in failed]
            count = format_count(len(failed), "job")
            print(f"{program_name()}: error: {count} of the sweep failed:\n" + "\n".join(lines), file=sys.stderr)
            raise SystemExit(FAILED_EXIT_CODE)


def _failure_records(config: DictConfig) -> dict[Path, tuple[int, int]]:
    """Time of change and size of each ``failed.json`` of a sweep.

    The times are compared only with each other: the clock of a file server may differ from that of this machine.
    """
    records = sorted(Path(str(config.hydra.sweep.dir)).rglob(FAILED))
    return {path: ((status := path.stat()).st_mtime_ns, status.st_size) for path in records}
