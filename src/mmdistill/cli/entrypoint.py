"""From a command line to one call with a valid config: shared by both entrypoints. Imports no torch."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mmdistill.cli import sweep
from mmdistill.config import (
    ConfigError,
    explain,
    parse,
    register_schemas,
    to_plain,
)
from mmdistill.config.compose import CONFIGS, T
from mmdistill.config.overrides import add_overrides, quote_overrides
from mmdistill.distributed import launch
from mmdistill.errors import InputError, MMDistillError


def run_entrypoint(job: Callable[[T, str], None], schema: type[T], *, config_name: str) -> None:
    """Compose, validate, call ``job(config, run folder)``; wrong input ends with one line and status 2.

    A job of a sweep (`-m`) that fails does not end the others, see `mmdistill.cli.sweep`.

    Other ranks than 0 make no folder of their own: their clocks may differ, and rank 0's run folder is the run's. With
    ``devices=N`` under plain ``python`` this process starts the N ranks and waits for them.
    """
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    launch.set_env_from_slurm()
    if launch.is_nonzero_rank():
        aside = tempfile.TemporaryDirectory(prefix="mmdistill-rank-")  # multirun.yaml of a sweep; removed at exit
        folders = ["hydra.run.dir=.", f"hydra.sweep.dir={aside.name}", "hydra.sweep.subdir=${hydra:job.num}"]
        quiet = ["hydra.output_subdir=null", "hydra/job_logging=disabled"]
        sys.argv[1:] = add_overrides(sys.argv[1:], [*folders, *quiet])
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing, so that we can add near matches
    register_schemas()
    jobs = 0

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def composed(cfg: DictConfig) -> float | None:
        nonlocal jobs
        jobs += 1
        os.chdir(
            HydraConfig.get().runtime.cwd
        )  # paths start where the command was typed, also with hydra.job.chdir=true
        launch.set_env_from_slurm()  # a job that submitit started came here without a command line
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            _place(job, parse(cfg, schema))
            return None
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        if launch.launched_externally() and int(os.environ["WORLD_SIZE"]) > 1:
            _place(job, parse(cfg, schema))
            return _rank_zeros_objective(run_dir)
        return sweep.run_job(lambda: _place(job, parse(cfg, schema)), run_dir, lambda error: explain(error, schema))

    try:
        composed()
        sweep.exit_if_failed()
    except Exception as error:
        try:
            launch.reset_sigchld_handler()
        except RuntimeError:  # a second worker has died meanwhile
            launch.reset_sigchld_handler()
        _end(error, schema, jobs)


def _place(job: Callable[[T, str], None], config: T) -> None:
    """Run the job in this process, or in as many as `devices` asks for."""
    hydra_config = HydraConfig.get()
    run_dir = hydra_config.runtime.output_dir
    count, gpus = launch.resolve_devices(config.devices, config.accelerator)
    if gpus is not None:
        launch.set_visible_devices(gpus)
    if count == 1:
        if not launch.is_nonzero_rank():
            from mmdistill.training.run_metadata import record_run  # imports torch, which a wrong config never gets to

            world = int(os.environ["WORLD_SIZE"]) if launch.launched_externally() else 1
            record_run(Path(run_dir), to_plain(config), processes=world, accelerator=config.accelerator)
        job(config, run_dir)
        return
    if hydra_config.mode is RunMode.MULTIRUN:
        raise ConfigError(
            f"devices={config.devices} with -m: a sweep starts no processes of its own; "
            f"use torchrun --nproc_per_node={count} {Path(sys.argv[0]).name} -m ..., or devices=1"
        )
    status = launch.spawn_ranks(count, run_dir, cwd=hydra_config.runtime.cwd)
    if status:
        raise SystemExit(status)


def _rank_zeros_objective(run_dir: Path) -> float:
    """What the job is judged by, on every rank: a sweeper that chooses by it must choose the same everywhere."""
    from mmdistill.distributed.collectives import broadcast_object

    return float(broadcast_object(float("nan") if launch.is_nonzero_rank() else sweep.objective(run_dir)))


def _end(error: Exception, schema: type[T], job: int) -> None:
    """Say what went wrong, once however many ranks there are, and end: status 2 for wrong input, else 1."""
    status = error.exit_status if isinstance(error, MMDistillError) else 1
    if isinstance(error, HydraException | OmegaConfBaseException):
        status = InputError.exit_status
    expected = isinstance(error, MMDistillError | HydraException | OmegaConfBaseException)
    line = f"mmdistill: error: {explain(error, schema)}" if expected else None
    if launch.launched_externally():
        launch.exit_after_timeout(status)
        _say_of_rank(error, line, launch.claim_first_failure(job))
        _let_go(error)
        launch.wait_for_failure_readers(job)
    elif line is None:
        raise error  # a defect, which deserves its traceback
    else:
        print(line, file=sys.stderr)
    raise SystemExit(status)


def _say_of_rank(error: Exception, line: str | None, first: int | None) -> None:
    """What this rank has to say of its error: of a failure that is another's, or every rank's, nothing."""
    rank = int(os.environ["RANK"])
    if first == launch.UNKNOWN_RANK:
        alike = line is not None and isinstance(error, FloatingPointError)  # rank 0 had it too, and has said it
        if not alike:
            print(f"mmdistill: rank {rank} lost the others: {type(error).__name__}: {error}", file=sys.stderr)
        return
    if first is None and rank > 0 and isinstance(error, HydraException | ConfigError):
        return  # every rank composes the same config; rank 0 says what is wrong with it
    if first not in (None, rank):
        return
    if int(os.environ["WORLD_SIZE"]) > 1:
        print(f"mmdistill: rank {rank} failed first:", file=sys.stderr)
    if line is None:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        print(line, file=sys.stderr)
    sys.stderr.flush()  # ranks end as soon as one has; then a launcher stops this one too


def _let_go(error: BaseException | None) -> None:
    """Drop what the failed job held, its process groups among it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
