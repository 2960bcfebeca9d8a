"""The SLURM example of docs/cluster.md runs as written, with a stand-in for SLURM and programs that do not train."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdistill.distributed import launch
from tests.commands import ROOT, run_python
from tests.tiny_data import MODEL, make_tiny, overrides

# Records the variables and arguments of a rank. In a training the first start of a job is interrupted, as by SIGUSR1.
PROGRAM = f"""
import json, os, sys
folder = next(a for a in sys.argv if a.startswith("hydra.run.dir=")).partition("=")[2]
os.makedirs(folder, exist_ok=True)
start = {{k: v for k, v in os.environ.items() if k.startswith("SLURM_")}}
restart = start["SLURM_RESTART_COUNT"]
with open(os.path.join(folder, f"{{restart}}-{{start['SLURM_PROCID']}}.json"), "w") as file:
    json.dump({{**start, "arguments": sys.argv[1:]}}, file)
sys.exit({launch.INTERRUPTED_EXIT_CODE} if "resume=auto" in sys.argv and restart == "0" else 0)
"""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
                  "MMDISTILL_RUN_ID")  # fmt: skip


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Starts of the ranks by run folder, after the commands of the example."""
    folder = tmp_path_factory.mktemp("slurm")
    section = (ROOT / "docs" / "cluster.md").read_text().partition("## SLURM")[2].partition("\n## ")[0]
    *jobs, submit = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    for name, job in zip(("pretrain", "distill", "evaluate"), jobs, strict=True):
        (folder / f"{name}.sbatch").write_text(job)
    (folder / "pretrain_main.py").write_text(PROGRAM)
    (folder / "lit_main_mmdistill.py").write_text(PROGRAM)
    (folder / "find_checkpoints.py").write_text("""print('{"ckpt_path": ["a", "b", "c"]}')""")
    (folder / "bin").mkdir()
    python = f"exec {sys.executable} -S -E"  # without packages: 18 ranks start in a second
    stand_in = f'{python} {ROOT / "tests" / "slurm_stand_in.py"} $(basename "$0") "$@"'
    programs = {**dict.fromkeys(("srun", "sbatch", "scontrol"), stand_in), "python": f'{python} "$@"'}
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "STAND_IN": str(folder)}
    done = subprocess.run(["bash", "-euc", submit], cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for file in sorted((folder / "output" / "tennis").rglob("*.json")):
        found.setdefault(file.parent.name, []).append(json.loads(file.read_text()))
    return found


def test_interrupted_trainings_are_requeued_until_they_end(starts: dict[str, list[dict[str, str]]]) -> None:
    """Two starts of two ranks for each training, one start for the evaluation, which needs both to succeed."""
    trainings = ["mmdistill", "pretrain_flow", "pretrain_rgb", "pretrain_skeleton"]
    assert {name: len(found) for name, found in starts.items()} == {**dict.fromkeys(trainings, 4), "test": 2}
    assert "trainer.ckpt_path=[a, b, c]" in [a.replace('"', "") for a in starts["mmdistill"][0]["arguments"]]


def test_ranks_of_one_start_meet_and_no_others(
    starts: dict[str, list[dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for variables in (start for group in starts.values() for start in group):
        environment = {name: value for name, value in variables.items() if name.startswith("SLURM_")}
        monkeypatch.setattr(os, "environ", environment)
        launch.set_env_from_slurm()
        found.append([environment[name] for name in RANK_VARIABLES])
    assert {(*start[:5],) for start in found} == {(rank, "2", rank, "2", "c1-0n3") for rank in ("0", "1")}
    ids = [start[6] for start in found]
    assert {ids.count(name) for name in ids} == {2}  # each start has its own
    assert len({start[5] for start in found}) == len(starts)  # a requeued job uses its port again


def test_ranks_of_the_example_train(starts: dict[str, list[dict[str, str]]], tmp_path: Path) -> None:
    """The two ranks of one start meet and train, with the variables and arguments that the stand-in gave them."""
    tiny = [*overrides(make_tiny(tmp_path / "data", per_class=2)), *MODEL, "trainer.epochs=1", "accelerator=cpu"]
    own = [*tiny, f"hydra.run.dir={tmp_path / 'run'}"]
    ranks = [s for s in starts["pretrain_flow"] if s["SLURM_RESTART_COUNT"] == "0"]
    file = tmp_path / "starts.json"
    file.write_text(json.dumps([{**rank, "arguments": [*rank["arguments"], *own]} for rank in ranks]))
    done = run_python("tests/integration/slurm_ranks.py", "pretrain_main.py", file)
    assert "24 clips, 1 batch of 8 per process and epoch (8 clips skipped" in done.stderr  # by two ranks
    assert done.stderr.count("last checkpoint") == 1
