"""Several runs of the entrypoints, one after another or side by side, of which only the missing ones are done."""

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
from mmdistill.config.compose import load_config
from mmdistill.errors import MMDistillError
from mmdistill.modalities import BUILTIN_MODALITIES
from mmdistill.training.run_metadata import RUN_FILE, git_state

ROOT = Path(__file__).resolve().parents[3]
ENTRYPOINTS: dict[str, tuple[Any, str]] = {
    "pretrain_main.py": (PretrainConfig, "config_pretrain"),
    "lit_main_mmdistill.py": (DistillConfig, "config_mmdistill"),
}


class StageError(MMDistillError):
    """A run failed, or its folder holds another one; the message names it and what to do."""


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        name: for messages.
        script: entrypoint, relative to the repository root.
        overrides: Hydra overrides.
        run_dir: the run's folder; ``done.json`` in it says that the run is finished, ``run.json`` which one it is.
        needs: names of stages that must be finished first.
        teachers: ``checkpoints`` folders by modality; the newest checkpoint in each becomes `trainer.ckpt_path`.
    """

    name: str
    script: str
    overrides: tuple[str, ...]
    run_dir: Path
    needs: tuple[str, ...] = ()
    teachers: tuple[tuple[str, Path], ...] = ()

    def _arguments(self) -> list[str]:
        """The overrides, with the teachers' checkpoints as they are now."""
        if not self.teachers:
            return list(self.overrides)
        newest = {m: latest_valid_checkpoint(folder) for m, folder in self.teachers}
        return [*self.overrides, "trainer.ckpt_path={" + ",".join(f"{m}:{path}" for m, path in newest.items()) + "}"]

    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, str(ROOT / self.script), *self._arguments(), f"hydra.run.dir={self.run_dir}"]

    def config(self) -> dict[str, Any]:
        """What the run would be started with, all defaults among it, as ``run.json`` holds it."""
        schema, name = ENTRYPOINTS[Path(self.script).name]
        plain: dict[str, Any] = json.loads(json.dumps(to_plain(load_config(schema, name, self._arguments()))))
        return plain

    def records(self) -> list[dict[str, Any]]:
        """Each start of the run so far."""
        path = self.run_dir / RUN_FILE
        return json.loads(path.read_text()) if path.is_file() else []

    def marker(self) -> dict[str, Any] | None:
        """When the run was finished, and from which ones it was made; None before."""
        path = self.run_dir / "done.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def check(self) -> None:
        """Whether what the folder holds, finished or begun, is this run; never reused or gone on with in silence.

        Raises:
            StageError: it was started with other settings, or by another version.
        """
        records = self.records()
        if not records and self.marker() is None:
            return
        way_out = "move it away, or give another --output"
        if not records:
            raise StageError(f"{self.run_dir} has no {RUN_FILE}, which would say what run it holds; {way_out}")
        now = self.config()
        for record in records:
            other = _differences(record["config"], now)
            if other:
                raise StageError(
                    f"{self.run_dir} holds a run with other settings (there / now): {'; '.join(other[:3])}; {way_out}"
                )
            version = record["environment"]["mmdistill"]
            if version != __version__:
                raise StageError(f"{self.run_dir} was made by mmdistill {version}, this is {__version__}; {way_out}")

    def mark_done(self, seconds: float, needs: dict[str, str]) -> None:
        """Record the end of the run, and when those that it `needs` had ended."""
        content = {"finished": datetime.now(UTC).isoformat(), "needs": needs, "seconds": round(seconds, 1)}
        (self.run_dir / "done.json").write_text(json.dumps(content, indent=1))


def _differences(there: Any, now: Any, key: str = "") -> list[str]:
    """``trainer.epochs 1 / 12`` for each value that differs."""
    if isinstance(there, dict) and isinstance(now, dict):
        names = [*there, *(name for name in now if name not in there)]
        prefix = f"{key}." if key else ""
        return [d for name in names for d in _differences(there.get(name), now.get(name), prefix + name)]
    return [] if there == now else [f"{key} {there} / {now}"]


def done_already(stages: Sequence[Stage]) -> list[Stage]:
    """Those that are done, by this very config and version, and from the runs that are there now.

    Raises:
        StageError: a folder holds another run, or one that was made from another run of a stage that it needs.
    """
    ended = {s.name: (s.marker() or {}).get("finished") for s in stages}
    done = [s for s in stages if s.marker() is not None]
    for stage in stages:
        for need, when in (stage.marker() or {}).get("needs", {}).items():
            if ended.get(need) != when:
                raise StageError(f"{stage.run_dir} was made from an earlier run of {need}; move it away too")
        stage.check()
    return done


def _other_code(stages: Sequence[Stage]) -> str:
    """One line where stages were made by another commit than this; "" where not."""
    now = _commit(git_state(ROOT))
    others: dict[str, list[str]] = {}
    for stage in stages:
        for commit in {_commit(record["git"]) for record in stage.records()} - {now}:
            others.setdefault(commit, []).append(stage.name)
    told = "; ".join(f"{', '.join(names)} by {commit}" for commit, names in others.items())
    return f"made by other code than this ({now}): {told}; to do one again, move its folder away" if told else ""


def _commit(state: dict[str, Any] | None) -> str:
    """A name for the code: the commit, and whether the package or its configs differ from it."""
    if state is None:
        return "no commit"
    changed = any(name.startswith(("src/", "configs/")) for name in state["changed"])
    return f"commit {state['commit'][:10]}{' with changes' if changed else ''}"


def run_stages(stages: Sequence[Stage], *, parallel: int = 1) -> None:
    """Run what is missing, at most `parallel` at a time, each with its share of the cores.

    One at a time prints to this terminal; side by side each writes ``log.txt`` in its folder, and a line here tells of
    starts and ends. Ctrl-C is passed on: runs write a checkpoint and the next call goes on from it.

    Raises:
        StageError: of `done_already`, before anything starts; or a run failed, then those that run are ended first.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // parallel))}
    ready = done_already(stages)
    waiting = [s for s in stages if s not in ready]
    done = {s.name for s in ready}
    if done:
        print(f"done already: {', '.join(s.name for s in ready)}", flush=True)
    if other := _other_code(stages):
        print(other, flush=True)
    running: dict[str, tuple[Stage, subprocess.Popen[bytes], float]] = {}
    total = len(stages)
    try:
        while waiting or running:
            for stage in [s for s in waiting if set(s.needs) <= done][: parallel - len(running)]:
                waiting.remove(stage)
                print(f"[{len(done) + len(running) + 1}/{total}] {stage.name}", flush=True)
                running[stage.name] = (stage, _start(stage, environment, quiet=parallel > 1), time.monotonic())
            if not running:
                raise StageError(
                    f"nothing can start: {', '.join(s.name for s in waiting)} wait for stages that do not exist"
                )
            finished = [name for name, (_, process, _) in running.items() if process.poll() is not None]
            for name in finished:
                stage, process, began = running.pop(name)
                if process.returncode != 0:
                    log = f"; see {stage.run_dir / 'log.txt'}" if parallel > 1 else ""
                    raise StageError(f"{name} ended with status {process.returncode}{log}")
                ends = {s.name: (s.marker() or {}).get("finished", "") for s in stages if s.name in stage.needs}
                stage.mark_done(time.monotonic() - began, ends)
                done.add(name)
                print(f"{name}: done in {time.monotonic() - began:.0f} s", flush=True)
            time.sleep(0.2)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _start(stage: Stage, environment: dict[str, str], *, quiet: bool) -> "subprocess.Popen[bytes]":
    if not quiet:
        return subprocess.Popen(stage.command(), cwd=ROOT, env=environment)
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    with (stage.run_dir / "log.txt").open("ab") as log:
        return subprocess.Popen(stage.command(), cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def method_stages(
    output: Path,
    *,
    seed: int,
    common: tuple[str, ...] = (),
    pretrain: tuple[str, ...] = (),
    distill: tuple[str, ...] = (),
    test: tuple[str, ...] = (),
    rgb_only: bool = False,
    prefix: str = "",
) -> list[Stage]:
    """The whole method as stages: three pretrainings, the distillation, its evaluation.

    Args:
        output: folder of the runs ``pretrain_rgb``, ``pretrain_flow``, ``pretrain_skeleton``, ``mmdistill``, ``test``.
        seed: of all of them.
        common, pretrain, distill, test: further overrides for all, or for one kind of stage.
        rgb_only: also distil the RGB teacher alone, and score that student beside the other.
        prefix: put before the stages' names.
    """
    shared = (f"seed={seed}", *common)
    runs = {m: output / f"pretrain_{m}" for m in BUILTIN_MODALITIES}
    stages = [
        Stage(
            f"{prefix}pretrain {m}", "pretrain_main.py", (f"modality={m}", *shared, *pretrain, "resume=auto"), runs[m]
        )
        for m in runs
    ]
    teachers = tuple((m, run / "checkpoints") for m, run in runs.items())
    fit = ("test=False", *shared, *distill, "resume=auto")
    needs = tuple(s.name for s in stages)
    stages.append(Stage(f"{prefix}distil", "lit_main_mmdistill.py", fit, output / "mmdistill", needs, teachers))
    student = output / "mmdistill" / "checkpoints" / "last.ckpt"
    compare = ["random", "teacher_rgb", "teacher_flow", "teacher_skeleton"]
    last = [stages[-1].name]
    if rgb_only:
        alone = output / "mmdistill_rgb_only"
        name, only = f"{prefix}distil rgb only", (*fit, "trainer.teachers=[rgb]")
        stages.append(Stage(name, "lit_main_mmdistill.py", only, alone, needs[:1], teachers[:1]))
        compare.append(str(alone / "checkpoints" / "last.ckpt"))
        last.append(stages[-1].name)
    score = ("train=False", "test=True", f"ckpt_path={student}", f"baselines=[{','.join(compare)}]", *shared, *test)
    stages.append(Stage(f"{prefix}evaluate", "lit_main_mmdistill.py", score, output / "test", tuple(last)))
    return stages
