"""``run.json``: what is needed to repeat a run. One record per start, so a resumed run has several."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mmdistill import __version__
from mmdistill.config.compose import SOURCE_ROOT
from mmdistill.data.cores import available_cores
from mmdistill.files import atomic_write_bytes, encode_json

RUN_FILE = "run.json"


def record_run(run_dir: Path, config: Mapping[str, Any], *, processes: int, accelerator: str) -> dict[str, Any]:
    """Append a record of this start to ``run.json``; call on rank 0. Returns the record.

    It has command, time (UTC), config, git state (None outside a repository) and environment; no host name. `config`
    are builtin containers, `processes` is the number of ranks. `accelerator` decides which device is recorded.
    """
    path = run_dir / RUN_FILE
    records = json.loads(path.read_bytes()) if path.is_file() else []
    record = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": git_state(SOURCE_ROOT),
        "environment": {**environment(accelerator), "processes": processes},
        "config": dict(config),
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, encode_json([*records, record]))
    return record


def update_record(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Add values to the record of this start; call on rank 0. Without ``run.json`` this function does nothing."""
    path = run_dir / RUN_FILE
    if path.is_file():
        *earlier, record = json.loads(path.read_bytes())
        atomic_write_bytes(path, encode_json([*earlier, {**record, **values}]))


def git_state(root: Path | None) -> dict[str, Any] | None:
    """Commit and changed files of a repository; None without git, a repository or a source tree (`root`)."""

    def run_git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, errors="replace").stdout

    with suppress(OSError, subprocess.SubprocessError):
        if root is not None:
            changed = [line[3:] for line in run_git("status", "--porcelain").splitlines()]
            return {"commit": run_git("rev-parse", "HEAD").strip(), "dirty": bool(changed), "changed": changed}
    return None


def environment(accelerator: str) -> dict[str, Any]:
    """Versions of Python and of this project's dependencies, platform, device, CPUs and threads."""
    import torch

    names, packages = {"torch", "numpy"}, {}
    with suppress(metadata.PackageNotFoundError):  # runs from the source tree, not installed
        required = metadata.requires("mmdistill") or []
        names |= {re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in required if "extra ==" not in r}
    for name in sorted(names):
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    return {
        "mmdistill": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cuda": torch.version.cuda if gpu else None,
        "cpus": available_cores(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }
