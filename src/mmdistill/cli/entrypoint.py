"""Turn a command line into one call with a valid config. Shared by the Hydra verbs. Imports no torch."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
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
from mmdistill.config.compose import T, configs_dir
from mmdistill.config.overrides import add_overrides, quote_overrides
from mmdistill.distributed import launch
from mmdistill.errors import InputError, MMDistillError
from mmdistill.workflows.sweep_results import objective


def run_entrypoint(
    job: Callable[[T, str], None],
    schema: type[T],
    *,
    config_name: str,
    verb: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Compose and validate the config, then call ``job(config, run_dir)``.

    Invalid input ends the process with a one-line message and status 2. A failed job of a sweep (`-m`) does not stop
    the other jobs, see `mmdistill.cli.sweep`.

    All ranks use the run folder of rank 0, because the clocks of the ranks may differ. With ``devices=N`` under plain
    ``python`` this process starts N ranks and waits for them.

    Args:
        job: function that does the work.
        schema: dataclass of the config.
        config_name: default of ``--config-name``.
        verb: verb of ``mmdistill`` that starts this job; errors name it.
        argv: arguments after the verb. None: this process was started by a script, with the arguments in `sys.argv`.
    """
    given: Sequence[str] = sys.argv[1:] if argv is None else argv
    sys.argv = [sys.argv[0] if argv is None else f"mmdistill {verb}", *quote_overrides(given)]
    launch.set_env_from_slurm()
    if launch.is_nonzero_rank():
        unused_dir = tempfile.TemporaryDirectory(prefix="mmdistill-rank-")  # for multirun.yaml; removed at exit
        overrides = ["hydra.run.dir=.", f"hydra.sweep.dir={unused_dir.name}", "hydra.sweep.subdir=${hydra:job.num}"]
        overrides += ["hydra.output_subdir=null", "hydra/job_logging=disabled"]
        sys.argv[1:] = add_overrides(sys.argv[1:], overrides)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # makes Hydra raise, so that `explain` can add near matches
    register_schemas()
    num_jobs = 0

    @hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)
    def run_composed(cfg: DictConfig) -> float | None:
        nonlocal num_jobs
        num_jobs += 1
        os.chdir(HydraConfig.get().runtime.cwd)  # paths are relative to the caller's folder, also with hydra.job.chdir
        launch.set_env_from_slurm()  # a job that submitit starts has no command line
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            run_or_spawn_ranks(job, parse(cfg, schema), verb if argv is not None else None)
            return None
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        if launch.launched_externally() and int(os.environ["WORLD_SIZE"]) > 1:
            run_or_spawn_ranks(job, parse(cfg, schema))
            return broadcast_objective(run_dir)
        return sweep.run_job(
            lambda: run_or_spawn_ranks(job, parse(cfg, schema)), run_dir, lambda error: explain(error, schema)
        )

    try:
        run_composed()
        sweep.exit_if_failed()
    except Exception as error:
        try:
            launch.reset_sigchld_handler()
        except RuntimeError:  # another loader worker died in the meantime
            launch.reset_sigchld_handler()
        exit_with_error(error, schema, num_jobs, verb)


def run_or_spawn_ranks(job: Callable[[T, str], None], config: T, verb: str | None = None) -> None:
    """Run the job in this process, or start `devices` ranks that run it.

    Args:
        job: function that does the work.
        config: its config.
        verb: verb of ``mmdistill`` that the ranks are started with; None: the script in ``sys.argv[0]``.
    """
    hydra_config = HydraConfig.get()
    run_dir = hydra_config.runtime.output_dir
    count, gpus = launch.resolve_devices(config.devices, config.accelerator)
    if gpus is not None:
        launch.set_visible_devices(gpus)
    if count == 1:
        if not launch.is_nonzero_rank():
            from mmdistill.training.run_metadata import record_run  # imports torch, which an invalid config must not

            world_size = int(os.environ["WORLD_SIZE"]) if launch.launched_externally() else 1
            record_run(Path(run_dir), to_plain(config), processes=world_size, accelerator=config.accelerator)
        job(config, run_dir)
        return
    cwd = hydra_config.runtime.cwd
    if hydra_config.mode is RunMode.MULTIRUN:
        raise ConfigError(
            f"devices={config.devices} with -m: a sweep does not start several processes per job; "
            f"use torchrun --nproc_per_node={count} {Path(sys.argv[0]).name} -m ..., or devices=1"
        )
    program = ["-m", "mmdistill", verb] if verb else [str(Path(cwd) / sys.argv[0])]
    status = launch.spawn_ranks(count, run_dir, cwd=cwd, program=program)
    if status:
        raise SystemExit(status)


def broadcast_objective(run_dir: Path) -> float:
    """Objective of the job on rank 0, returned on every rank, so that a sweeper chooses the same values on all."""
    from mmdistill.distributed.collectives import broadcast_object

    return float(broadcast_object(float("nan") if launch.is_nonzero_rank() else objective(run_dir)))


def exit_with_error(error: Exception, schema: type[T], job: int, verb: str | None = None) -> None:
    """Print the error from one rank and exit: status 2 for invalid input, the error's own status, else 1.

    Raises:
        SystemExit: always, except for a defect in a single process, whose exception is raised again.
    """
    status = error.exit_status if isinstance(error, MMDistillError) else 1
    if isinstance(error, HydraException | OmegaConfBaseException):
        status = InputError.exit_status
    expected = isinstance(error, MMDistillError | HydraException | OmegaConfBaseException)
    line = f"mmdistill{f' {verb}' if verb else ''}: error: {explain(error, schema)}" if expected else None
    if launch.launched_externally():
        launch.exit_after_timeout(status)
        report_rank_failure(error, line, launch.claim_first_failure(job))
        release_references(error)
        launch.wait_for_failure_readers(job)
    elif line is None:
        raise error  # a defect: Python prints the traceback
    else:
        print(line, file=sys.stderr)
    raise SystemExit(status)


def report_rank_failure(error: Exception, line: str | None, first: int | None) -> None:
    """Print the error of this rank unless another rank reports the same failure.

    Args:
        error: the exception.
        line: one-line message; None for a defect, which is printed with its traceback.
        first: rank that failed first; None before the process group exists; `launch.UNKNOWN_RANK` if rank 0, which
            keeps the record, does not answer.
    """
    rank = int(os.environ["RANK"])
    if first == launch.UNKNOWN_RANK:
        reported_by_rank_zero = line is not None and isinstance(error, FloatingPointError)  # every rank raises it
        if not reported_by_rank_zero:
            message = f"mmdistill: rank {rank}: connection to other ranks lost: {type(error).__name__}: {error}"
            print(message, file=sys.stderr)
        return
    if first is None and rank > 0 and isinstance(error, HydraException | ConfigError):
        return  # all ranks compose the same config, so rank 0 reports the same error
    if first not in (None, rank):
        return
    if int(os.environ["WORLD_SIZE"]) > 1:
        print(f"mmdistill: rank {rank} failed first:", file=sys.stderr)
    if line is None:
        sys.excepthook(type(error), error, error.__traceback__)
    else:
        print(line, file=sys.stderr)
    sys.stderr.flush()  # the launcher stops this rank as soon as any rank has ended


def release_references(error: BaseException | None) -> None:
    """Clear the frames of the failed job, so that its objects, including process groups, are freed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
