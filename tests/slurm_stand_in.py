"""Stand-in for SLURM on one machine: python slurm_stand_in.py (srun | sbatch | scontrol) ARGUMENTS...

``sbatch`` runs a job file at once, all tasks of an array one after the other, and again if ``scontrol requeue`` was
called. ``srun`` starts two tasks at most, with the variables that SLURM sets. The folder $STAND_IN has the state: the
number of the last job, exit statuses and requeued jobs.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ["STAND_IN"])
TASKS = 2


def _next_number(name: str) -> int:
    path = STATE / name
    number = int(path.read_text()) + 1 if path.exists() else 0
    path.write_text(str(number))
    return number


def sbatch(arguments: list[str]) -> int:
    """Run a job file whose dependencies have succeeded, and print its number."""
    options, script = arguments[:-1], Path(arguments[-1]).read_text()
    dependencies = [o.partition("afterok:")[2] for o in options if o.startswith("--dependency")]
    array = re.search(r"--array=(\d+)-(\d+)", script)
    first = 100 + 10 * _next_number("job")
    ran = all((STATE / f"status-{job}").read_text() == "0" for job in dependencies)
    statuses = []
    for task in range(int(array[1]), int(array[2]) + 1) if array else [None]:
        names = {"JOB_ID": first if task is None else first + task}
        if task is not None:
            names |= {"ARRAY_JOB_ID": first, "ARRAY_TASK_ID": task}
        requeued = STATE / f"requeue-{first if task is None else f'{first}_{task}'}"
        restarts, status = 0, 1
        while ran:
            variables = {f"SLURM_{k}": str(v) for k, v in {**names, "RESTART_COUNT": restarts}.items()}
            status = subprocess.run(["bash", arguments[-1]], env={**os.environ, **variables}).returncode
            if not requeued.exists():
                break
            requeued.unlink()
            restarts += 1
        statuses.append(status)
    (STATE / f"status-{first}").write_text(str(max(statuses)))
    print(first)
    return 0


def srun(arguments: list[str]) -> int:
    """Start the command as `TASKS` tasks of a new step. Returns the highest exit status."""
    command = arguments[next(i for i, a in enumerate(arguments) if not a.startswith("-")) :]
    step = _next_number(f"step-{os.environ['SLURM_JOB_ID']}-{os.environ['SLURM_RESTART_COUNT']}")
    common = {"STEP_ID": step, "STEP_NUM_TASKS": TASKS, "STEP_TASKS_PER_NODE": TASKS, "STEP_NODELIST": "c1-[0]n[3]"}
    tasks = []
    for rank in range(TASKS):
        names = {**common, "PROCID": rank, "LOCALID": rank, "CPUS_PER_TASK": 8}
        environment = {**os.environ, **{f"SLURM_{k}": str(v) for k, v in names.items()}}
        tasks.append(subprocess.Popen(command, env=environment))
    return max(task.wait() for task in tasks)


def scontrol(arguments: list[str]) -> int:
    """Mark a job for another run."""
    (STATE / f"requeue-{arguments[1]}").touch()
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "sbatch": sbatch, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
