"""Several runs of the entrypoints, one after another or side by side, of which only the missing ones are done."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdistill.checkpoint import newest_complete

ROOT = Path(__file__).resolve().parents[2]


class StageError(RuntimeError):
    """A run failed; the message names it, its exit status and its log."""


@dataclass(frozen=True)
class Stage:
    """One run.

    Attributes:
        name: for messages.
        script: entrypoint, relative to the repository root.
        overrides: Hydra overrides.
        run_dir: the run's folder; ``done.json`` in it says that the run with these overrides is finished.
        needs: names of stages that must be finished first.
        teachers: ``checkpoints`` folders by modality; the newest checkpoint in each becomes `trainer.ckpt_path`.
    """

    name: str
    script: str
    overrides: tuple[str, ...]
    run_dir: Path
    needs: tuple[str, ...] = ()
    teachers: tuple[tuple[str, Path], ...] = ()

    def command(self) -> list[str]:
        """The command line, with the run's folder and the teachers' checkpoints as they are now."""
        line = [sys.executable, str(ROOT / self.script), *self.overrides, f"hydra.run.dir={self.run_dir}"]
        if self.teachers:
            newest = {m: newest_complete(folder) for m, folder in self.teachers}
            line.append("trainer.ckpt_path={" + ",".join(f"{m}:{path}" for m, path in newest.items()) + "}")
        return line

    def is_done(self) -> bool:
        """Whether this very run is finished. The same folder with other overrides is an error, never a silent reuse."""
        marker = self.run_dir / "done.json"
        if not marker.exists():
            return False
        stored = json.loads(marker.read_text())["overrides"]
        if stored != list(self.overrides):
            raise StageError(f"{self.run_dir} holds a run with other settings; move it away, or give another --output")
        return True

    def mark_done(self, seconds: float) -> None:
        """Record the end of the run."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"overrides": list(self.overrides), "seconds": round(seconds, 1)}, indent=1)
        (self.run_dir / "done.json").write_text(text)


def run_stages(stages: Sequence[Stage], *, parallel: int = 1) -> None:
    """Run what is missing, at most `parallel` at a time, each with its share of the cores.

    One at a time prints to this terminal; side by side each writes ``log.txt`` in its folder, and a line here tells of
    starts and ends. Ctrl-C is passed on: runs write a checkpoint and the next call goes on from it.

    Raises:
        StageError: a run failed; those already running are ended first.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // parallel))}
    waiting = [s for s in stages if not s.is_done()]
    done = {s.name for s in stages} - {s.name for s in waiting}
    if done:
        print(f"done already: {', '.join(s.name for s in stages if s.name in done)}", flush=True)
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
                stage.mark_done(time.monotonic() - began)
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
    runs = {m: output / f"pretrain_{m}" for m in ("rgb", "flow", "skeleton")}
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
    score = ("train=False", "test=True", f"ckpt_path={student}", f"compare=[{','.join(compare)}]", *shared, *test)
    stages.append(Stage(f"{prefix}evaluate", "lit_main_mmdistill.py", score, output / "test", tuple(last)))
    return stages
