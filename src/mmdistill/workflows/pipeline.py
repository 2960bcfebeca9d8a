"""Run several stages (pretraining, distillation, evaluation) one after another or in parallel; skip completed ones."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmdistill import __version__
from mmdistill.checkpoint import latest_valid_checkpoint
from mmdistill.config import DistillConfig, PretrainConfig, to_plain
from mmdistill.config.compose import SOURCE_ROOT, load_config
from mmdistill.data.cores import available_cores
from mmdistill.data.process_pool import exit_on_sigterm
from mmdistill.errors import MMDistillError
from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import BUILTIN_MODALITIES
from mmdistill.training.run_metadata import RUN_FILE, git_state

DONE_FILE = "done.json"
STAGE_LOG = "log.txt"  # output of a stage that runs in parallel with others
_PROGRESS_SECONDS = 30.0
DISTILLATION = "experiment=standardized_segments"  # of the stages of the method; measured in docs/results.md
BASELINES = ("random", "teacher_rgb", "teacher_flow", "teacher_skeleton")
VERBS: dict[str, tuple[Any, str]] = {  # verb of `mmdistill` -> schema and name of its config
    "pretrain": (PretrainConfig, "config_pretrain"),
    "distill": (DistillConfig, "config_mmdistill"),
}


class StageError(MMDistillError):
    """A stage failed, or its folder contains another run. The message names the folder and the fix."""


@dataclass(frozen=True)
class Stage:
    """One run of a verb.

    Attributes:
        name: name in messages.
        verb: ``pretrain`` or ``distill``.
        overrides: Hydra overrides.
        run_dir: folder of the run. ``run.json`` in it has the config, ``done.json`` exists when the run is complete.
        needs: names of the stages that must be complete first.
        teachers: (modality, ``checkpoints`` folder). The latest checkpoint of each becomes `trainer.ckpt_path`.
    """

    name: str
    verb: str
    overrides: tuple[str, ...]
    run_dir: Path
    needs: tuple[str, ...] = ()
    teachers: tuple[tuple[str, Path], ...] = ()

    def arguments(self) -> list[str]:
        """The overrides, including the current checkpoints of the teachers."""
        if not self.teachers:
            return list(self.overrides)
        latest = {m: latest_valid_checkpoint(folder) for m, folder in self.teachers}
        return [*self.overrides, "trainer.ckpt_path={" + ",".join(f"{m}:{path}" for m, path in latest.items()) + "}"]

    def command(self) -> list[str]:
        """The command line that starts the run."""
        return [sys.executable, "-m", "mmdistill", self.verb, *self.arguments(), f"hydra.run.dir={self.run_dir}"]

    def config(self) -> dict[str, Any]:
        """The complete config of the run in the form of ``run.json``."""
        schema, name = VERBS[self.verb]
        plain: dict[str, Any] = json.loads(json.dumps(to_plain(load_config(schema, name, self.arguments()))))
        return plain

    def start_records(self) -> list[dict[str, Any]]:
        """One record of ``run.json`` per start of the run."""
        return self._read(RUN_FILE) or []

    def done_record(self) -> dict[str, Any] | None:
        """Content of ``done.json``: time of completion and of the stages it needs. None for an incomplete run."""
        record: dict[str, Any] | None = self._read(DONE_FILE)
        return record

    def _read(self, name: str) -> Any:
        path = self.run_dir / name
        return json.loads(path.read_bytes()) if path.is_file() else None

    def check_run_dir(self) -> None:
        """Raise `StageError` if a run in the folder has other settings or another version than this stage."""
        records = self.start_records()
        if not records and self.done_record() is None:
            return
        hint = "move it away or give another --output"
        if not records:
            raise StageError(f"{self.run_dir} has no {RUN_FILE}, so its settings are unknown; {hint}")
        requested = self.config()
        for record in records:
            if differences := config_differences(record["config"], requested):
                raise StageError(
                    f"{self.run_dir} contains a run with other settings (existing / requested): "
                    f"{'; '.join(differences[:3])}; {hint}"
                )
            version = record["environment"]["mmdistill"]
            if version != __version__:
                raise StageError(
                    f"{self.run_dir} was created by mmdistill {version}, the current version is {__version__}; {hint}"
                )

    def write_done_record(self, seconds: float, needs: dict[str, str]) -> None:
        """Mark the run as complete after `seconds`. `needs`: name of each needed stage -> its time of completion."""
        content = {"finished": datetime.now(UTC).isoformat(), "needs": needs, "seconds": round(seconds, 1)}
        atomic_write_bytes(self.run_dir / DONE_FILE, json.dumps(content, indent=1).encode())


def config_differences(existing: Any, requested: Any, key: str = "") -> list[str]:
    """``trainer.epochs 1 / 12`` for each value that differs."""
    if isinstance(existing, dict) and isinstance(requested, dict):
        names = [*existing, *(name for name in requested if name not in existing)]
        prefix = f"{key}." if key else ""
        pairs = [(existing.get(name), requested.get(name), prefix + name) for name in names]
        return [difference for pair in pairs for difference in config_differences(*pair)]
    return [] if existing == requested else [f"{key} {existing} / {requested}"]


def completed_stages(stages: Sequence[Stage]) -> list[Stage]:
    """The stages that are complete with the current config and version, and made from the current runs they need.

    Raises:
        StageError: a folder contains another run, or a stage was made from an earlier run of a stage that it needs.
    """
    records = {stage.name: stage.done_record() for stage in stages}
    finish_times = {name: (record or {}).get("finished") for name, record in records.items()}
    for stage in stages:
        for need, finished in (records[stage.name] or {}).get("needs", {}).items():
            if finish_times.get(need) != finished:
                raise StageError(
                    f"{stage.run_dir} was created from an earlier run of {need}; move it away to create it again"
                )
        stage.check_run_dir()
    return [stage for stage in stages if records[stage.name] is not None]


def commit_mismatch(stages: Sequence[Stage]) -> str:
    """One line that names the stages created by a different commit; empty if there are none."""
    current = commit_name(git_state(SOURCE_ROOT))
    others: dict[str, list[str]] = {}
    for stage in stages:
        for commit in {commit_name(record["git"]) for record in stage.start_records()} - {current}:
            others.setdefault(commit, []).append(stage.name)
    if not others:
        return ""
    listed = "; ".join(f"{', '.join(names)} by {commit}" for commit, names in others.items())
    return f"created by a different commit than the current {current}: {listed}; to rerun a stage, move its folder away"


def commit_name(state: dict[str, Any] | None) -> str:
    """Short name of a git state: the commit, and whether the package or its configs have uncommitted changes."""
    if state is None:
        return "no commit"
    changed = any(name.startswith(("src/", "configs/")) for name in state["changed"])
    return f"commit {state['commit'][:10]}{' with changes' if changed else ''}"


@dataclass(frozen=True)
class _RunningStage:
    stage: Stage
    process: "subprocess.Popen[bytes]"
    log: Path | None  # file of its output; None: this terminal
    start_time: float  # of `time.monotonic`


@exit_on_sigterm()
def run_stages(stages: Sequence[Stage], *, parallel: int = 1) -> None:
    """Run the missing stages, at most `parallel` at the same time. Each gets its share of the CPU cores.

    A stage that can only run alone gets all cores and prints to this terminal. The others write ``log.txt`` in their
    folders, and this process prints a line at each start and end, and the last line of each log every 30 s. Ctrl-C and
    SIGTERM reach all runs; they write a checkpoint, and the next call resumes from it.

    Raises:
        StageError: from `completed_stages`, before any run starts; or a run failed, after the other runs are stopped.
    """
    cores = available_cores()
    completed = completed_stages(stages)
    waiting = [stage for stage in stages if stage not in completed]
    done = {stage.name for stage in completed}
    if completed:
        print(f"already complete: {', '.join(stage.name for stage in completed)}", flush=True)
    if message := commit_mismatch(stages):
        print(message, flush=True)
    running: dict[str, _RunningStage] = {}
    shown: dict[str, str] = {}  # name of a stage -> last line of its log that was printed
    next_time = time.monotonic() + _PROGRESS_SECONDS
    try:
        while waiting or running:
            ready = [stage for stage in waiting if set(stage.needs) <= done]
            is_alone = parallel == 1 or len(ready) + len(running) == 1  # others become ready only when it is complete
            for stage in ready[: parallel - len(running)]:
                waiting.remove(stage)
                log = None if is_alone else stage.run_dir / STAGE_LOG
                where = f": log in {log}" if log else ""
                print(f"[{len(done) + len(running) + 1}/{len(stages)}] {stage.name}{where}", flush=True)
                shown[stage.name] = _last_log_line(stage)  # of an earlier run
                environment = {**os.environ, "OMP_NUM_THREADS": str(cores if is_alone else max(1, cores // parallel))}
                running[stage.name] = _RunningStage(stage, start_stage(stage, environment, log), log, time.monotonic())
            if not running:
                names = ", ".join(stage.name for stage in waiting)
                raise StageError(f"no stage can start: {names} need stages that are not in the list")
            for name in [name for name, run in running.items() if run.process.poll() is not None]:
                run = running.pop(name)
                seconds = time.monotonic() - run.start_time
                if status := run.process.returncode:
                    hint = f"; see {run.log}" if run.log else ""
                    raise StageError(f"{name} failed with exit status {status}{hint}")
                needs = {
                    s.name: (s.done_record() or {}).get("finished", "") for s in stages if s.name in run.stage.needs
                }
                run.stage.write_done_record(seconds, needs)
                done.add(name)
                print(f"{name}: complete after {seconds:.0f} s", flush=True)
            if time.monotonic() > next_time:
                _print_progress([run.stage for run in running.values() if run.log], shown)
                next_time = time.monotonic() + _PROGRESS_SECONDS
            time.sleep(0.2)
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()


def _print_progress(stages: Sequence[Stage], shown: dict[str, str]) -> None:
    """Print the last line of the log of each stage, unless it is the printed one."""
    for stage in stages:
        line = _last_log_line(stage)
        if line != shown[stage.name]:
            shown[stage.name] = line
            name = stage.name.rpartition(": ")[2]  # with which the progress of a run starts
            print(f"{stage.name}: {line.removeprefix(f'{name} ')}", flush=True)


def _last_log_line(stage: Stage) -> str:
    path = stage.run_dir / STAGE_LOG
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return lines[-1] if lines else ""


def start_stage(stage: Stage, environment: dict[str, str], log: Path | None) -> "subprocess.Popen[bytes]":
    """Start the run of a stage. Its output is appended to `log`; None: it goes to this terminal."""
    if log is None:
        return subprocess.Popen(stage.command(), env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(stage.command(), env=environment, stdout=file, stderr=subprocess.STDOUT)


def method_stages(
    output: Path,
    *,
    seed: int,
    common: tuple[str, ...] = (),
    train: tuple[str, ...] = (),
    test: tuple[str, ...] = (),
    subsets: Sequence[tuple[str, ...]] = (),
    baselines: Sequence[str] = BASELINES,
    prefix: str = "",
) -> list[Stage]:
    """The stages of the method: three pretrainings, the distillation and its evaluation.

    Args:
        output: folder of the runs ``pretrain_rgb``, ``pretrain_flow``, ``pretrain_skeleton``, ``mmdistill``, ``test``.
        seed: seed of all stages.
        common: further overrides for all stages.
        train: further overrides for the pretrainings and distillations.
        test: further overrides for the evaluation.
        subsets: also distill from these teachers only, each into ``mmdistill_FIRST_SECOND``, and evaluate the students
            as baselines.
        baselines: of the evaluation, without those students.
        prefix: text in front of the names of the stages.
    """
    shared = (f"seed={seed}", "precision=32", *common)  # the same numbers on each CPU
    runs = {m: output / f"pretrain_{m}" for m in BUILTIN_MODALITIES}
    stages = [
        Stage(f"{prefix}pretrain {m}", "pretrain", (f"modality={m}", *shared, *train, "resume=auto"), run_dir)
        for m, run_dir in runs.items()
    ]
    teachers = tuple((m, run_dir / "checkpoints") for m, run_dir in runs.items())
    fit = ("test=False", DISTILLATION, *shared, *train, "resume=auto")
    needs = tuple(stage.name for stage in stages)
    stages.append(Stage(f"{prefix}distill", "distill", fit, output / "mmdistill", needs, teachers))
    student = output / "mmdistill" / "checkpoints" / "last.ckpt"
    evaluated = list(baselines)
    students = [stages[-1].name]
    for subset in subsets:
        run_dir = output / f"mmdistill_{'_'.join(subset)}"
        overrides = (*fit, f"trainer.teachers=[{','.join(subset)}]")
        name = f"{prefix}distill {' '.join(subset)} only"
        needed = tuple(need for need, m in zip(needs, runs, strict=True) if m in subset)
        stages.append(
            Stage(name, "distill", overrides, run_dir, needed, tuple(pair for pair in teachers if pair[0] in subset))
        )
        evaluated.append(str(run_dir / "checkpoints" / "last.ckpt"))
        students.append(name)
    score = ("train=False", "test=True", f"ckpt_path={student}", f"baselines=[{','.join(evaluated)}]", *shared, *test)
    stages.append(Stage(f"{prefix}evaluate", "distill", score, output / "test", tuple(students)))
    return stages
