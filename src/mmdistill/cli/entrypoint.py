"""Turn a command line into one call with a valid config. Shared by the Hydra verbs. Imports no torch."""

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mmdistill.cli import imports_without_collections, sweep
from mmdistill.cli.compiler import explain_compiler_errors
from mmdistill.cli.hydra_help import (
    describe_rejected_group,
    has_misfit,
    parse_options,
    render_help,
)
from mmdistill.cli.job_names import shorten_subdirs
from mmdistill.cli.memory import explain_memory_errors
from mmdistill.cli.run_folder import RunFolderCallback, restore_folders
from mmdistill.config import ConfigError, explain, parse, register_schemas, to_plain
from mmdistill.config.compose import T, configs_dir, explain_null_source, select_files
from mmdistill.config.overrides import add_overrides, quote_overrides
from mmdistill.console import exit_if_pipe_closed
from mmdistill.distributed import launch
from mmdistill.errors import InputError, MMDistillError
from mmdistill.files import WriteError, is_disk_error, require_utf8_name, temporary_folder_until_exit
from mmdistill.workflows.sweep_results import objective


def run_entrypoint(
    job: Callable[[T, str], None],
    schema: type[T],
    *,
    config_name: str,
    usage: str = "",
    verb: str | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Compose and validate the config, then call ``job(config, run_dir)``.

    Invalid input ends the process with a one-line message and status 2, Ctrl-C with one line and status 130. A failed
    job of a sweep (`-m`) does not stop the other jobs, see `mmdistill.cli.sweep`. A command that ends before its run
    has started leaves the run folder as it was, see `mmdistill.cli.run_folder`.

    All ranks use the run folder of rank 0, because the clocks of the ranks may differ. With ``devices=N`` under plain
    ``python`` this process starts N ranks and waits for them.

    Args:
        job: function that does the work.
        schema: dataclass of the config.
        config_name: default of ``--config-name``.
        usage: start of the text of ``--help``.
        verb: verb of ``mmdistill`` that starts this job; errors name it.
        argv: arguments after the verb. None: this process was started by a script, with the arguments in `sys.argv`.
    """
    _set_arguments(argv, verb, schema)
    logging.raiseExceptions = False  # a full disk would print a traceback for each line of the log of Hydra
    threading.excepthook = _report_thread_error
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # makes Hydra raise, so that `explain` can add near matches
    register_schemas()

    def report(error: Exception) -> NoReturn:
        with contextlib.suppress(RuntimeError):  # another loader worker died in the meantime
            launch.reset_sigchld_handler()
        launch.reset_sigchld_handler()
        exit_with_error(error, schema, verb)

    try:
        options = parse_options(sys.argv[1:])
        if options.help:
            with exit_if_pipe_closed():
                print(render_help(usage, schema, config_name, options))
            return
        if has_misfit(schema, options) and (rejected := describe_rejected_group(schema, config_name, options)):
            raise ConfigError(rejected)
    except Exception as error:
        report(error)

    @hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)
    def run_composed(cfg: DictConfig) -> float | None:
        try:
            return run_config(cfg)
        except Exception as error:
            report(error)  # here, because Hydra prints a line of its own about an exception that it receives

    def run_config(cfg: DictConfig) -> float | None:
        os.chdir(HydraConfig.get().runtime.cwd)  # paths are relative to the caller's folder, also with hydra.job.chdir
        launch.set_env_from_slurm()  # a job that submitit starts has no command line
        if HydraConfig.get().mode is not RunMode.MULTIRUN:
            run_or_spawn_ranks(job, parse(cfg, schema), verb if argv is not None else None)
            return None
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        if launch.launched_externally() and int(os.environ["WORLD_SIZE"]) > 1:
            run_or_spawn_ranks(job, parse(cfg, schema))
            from mmdistill.distributed.collectives import broadcast_object

            # of rank 0, so that a sweeper chooses the same values on all ranks
            return float(broadcast_object(None if launch.is_nonzero_rank() else objective(run_dir)))

        def run_parsed() -> None:
            config = parse(cfg, schema)
            sweep.run_unfinished(lambda: run_or_spawn_ranks(job, config), run_dir, to_plain(config))

        return sweep.run_job(run_parsed, run_dir, lambda error: explain(error, schema))

    try:
        with exit_if_pipe_closed(), _restored_folders():
            try:
                with explain_null_source(sys.argv[1:]):
                    run_composed()
            except KeyboardInterrupt:
                exit_after_interrupt(verb)
            except (HydraException, OmegaConfBaseException) as error:
                rejected = describe_rejected_group(schema, config_name, options)
                report(ConfigError(rejected) if rejected else error)
            except Exception as error:
                report(error)
    except SystemExit as end:
        if end.code == launch.INTERRUPTED_EXIT_CODE and launch.launched_externally():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent sends it as soon as one rank has ended
            launch.record_failure("stopped by a signal", launch.INTERRUPTED_EXIT_CODE)
        raise


def _set_arguments(argv: Sequence[str] | None, verb: str | None, schema: type[T]) -> None:
    """Write the arguments as Hydra reads them to `sys.argv`. A rank other than 0 gets no folder and no log."""
    given: Sequence[str] = sys.argv[1:] if argv is None else argv
    program = sys.argv[0] if argv is None else f"mmdistill {verb}"
    sys.argv = [program, *shorten_subdirs(select_files(quote_overrides(given), schema))]
    launch.set_env_from_slurm()
    if launch.is_nonzero_rank():
        unused_dir = temporary_folder_until_exit()  # for multirun.yaml
        overrides = ["hydra.run.dir=.", f"hydra.sweep.dir={unused_dir}", "hydra.sweep.subdir=${hydra:job.num}"]
        overrides += ["hydra.output_subdir=null", "hydra/job_logging=disabled"]
        sys.argv[1:] = add_overrides(sys.argv[1:], overrides)


def _report_thread_error(error: threading.ExceptHookArgs) -> None:
    """Print an exception of a thread, but not a full disk, which TensorBoard raises again in the main thread."""
    if not is_disk_error(error.exc_value):
        threading.__excepthook__(error)


@contextlib.contextmanager
def _restored_folders() -> Iterator[None]:
    """At the end, undo what Hydra and `record_run` have written for a run that has not started."""
    status: object = None
    try:
        yield
    except SystemExit as end:
        status = end.code
        raise
    finally:
        ended_early = (InputError.exit_status, launch.INTERRUPTED_EXIT_CODE, launch.KEYBOARD_INTERRUPT_EXIT_CODE)
        restore_folders(refused=status in ended_early)


def exit_after_interrupt(verb: str | None = None) -> NoReturn:
    """Print one line and exit with status 130. Of several ranks, their launcher or rank 0 prints the line.

    Raises:
        SystemExit: always.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher forwards the signal that the terminal also sends
    status, line = launch.KEYBOARD_INTERRUPT_EXIT_CODE, f"{_program(verb)}: interrupted"
    if launch.launched_externally():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        launch.exit_after_timeout(status)
        if launch.record_failure(line, status) or launch.is_nonzero_rank():
            raise SystemExit(status)
    print(line, file=sys.stderr, flush=True)
    raise SystemExit(status)


def _program(verb: str | None) -> str:
    return f"mmdistill {verb}" if verb else "mmdistill"


def run_or_spawn_ranks(job: Callable[[T, str], None], config: T, verb: str | None = None) -> None:
    """Run the job in this process, or start `devices` ranks of ``mmdistill VERB`` or the script in ``sys.argv[0]``."""
    hydra_config = HydraConfig.get()
    run_dir = hydra_config.runtime.output_dir
    require_utf8_name(Path(run_dir))
    count, gpus = launch.resolve_devices(config.devices, config.accelerator)
    if gpus is not None:
        launch.set_visible_devices(gpus)
    if count == 1:
        if not launch.is_nonzero_rank():
            from mmdistill.training.run_metadata import record_run

            world_size = int(os.environ["WORLD_SIZE"]) if launch.launched_externally() else 1
            with imports_without_collections():  # it imports torch, which an invalid config must not
                record_run(Path(run_dir), to_plain(config), processes=world_size, accelerator=config.accelerator)
        with explain_memory_errors(), explain_compiler_errors():
            job(config, run_dir)
        return
    if hydra_config.mode is RunMode.MULTIRUN:
        raise ConfigError(
            f"devices={config.devices} with -m: a sweep does not start several processes per job; "
            f"use torchrun --nproc_per_node={count} {Path(sys.argv[0]).name} -m ..., or devices=1"
        )
    status = launch.run_ranks(count, run_dir, program=["-m", "mmdistill", verb] if verb else [sys.argv[0]])
    if status:
        raise SystemExit(status)


def exit_with_error(error: Exception, schema: type[T], verb: str | None = None) -> NoReturn:
    """Print the error and exit: status 2 for invalid input, the error's own status, else 1.

    If every rank raises the same error, rank 0 prints it. The ranks of ``devices=N`` print nothing: their launcher
    prints the error of the rank that failed first.

    Raises:
        SystemExit: always, except for a defect in a single process, whose exception is raised again.
    """
    error = _describe_folder_error(error)
    is_expected = isinstance(error, MMDistillError | HydraException | OmegaConfBaseException) or is_disk_error(error)
    if not is_expected and not launch.launched_externally():
        raise error  # a defect: Python prints the traceback
    status = error.exit_status if isinstance(error, MMDistillError) else InputError.exit_status if is_expected else 1
    text = "".join(traceback.format_exception(error))
    if is_expected:
        text = f"{_program(verb)}: error: {explain(error, schema)}"
    if launch.launched_externally():
        launch.exit_after_timeout(status)
        if launch.record_failure(text, status) or (launch.is_nonzero_rank() and _is_on_all_ranks(error)):
            raise SystemExit(status)
        if int(os.environ["WORLD_SIZE"]) > 1:
            text = f"mmdistill: rank {os.environ['RANK']} failed:\n{text}"
    print(text, file=sys.stderr, flush=True)
    raise SystemExit(status)


def _describe_folder_error(error: Exception) -> Exception:
    """The error to report for one of Hydra, which creates the run folder and writes to it."""
    folder = RunFolderCallback.RUN.folder if RunFolderCallback.RUN else None
    if is_disk_error(error) and error.filename is None:  # type: ignore[attr-defined]
        return WriteError(f"{folder or 'the run folder'}: a file was not written ({error})")
    if folder and isinstance(error, FileExistsError | NotADirectoryError):
        for path in (folder, *folder.parents):
            if os.path.lexists(path) and not path.is_dir():
                return ConfigError(f"hydra.run.dir={folder}: {path} is not a folder; choose another hydra.run.dir")
    return error


def _is_on_all_ranks(error: Exception) -> bool:
    """Whether every rank raises this error. Before the process group exists, all ranks compose the same config."""
    if isinstance(error, MMDistillError) and error.raised_on_all_ranks:
        return True
    torch = sys.modules.get("torch")
    in_group = torch is not None and torch.distributed.is_initialized()
    return not in_group and isinstance(error, HydraException | OmegaConfBaseException | ConfigError)
