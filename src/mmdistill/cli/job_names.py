"""Names of run folders, as resolvers for `hydra.run.dir` and `hydra.sweep.subdir`. Imports no torch."""

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

FIRST_JOB = "MMDISTILL_FIRST_JOB"  # environment variable: number of the first job of a sweep
SUBDIR = "hydra.sweep.subdir="
MAX_NAME_BYTES = 240  # file systems allow 255, and the number of a job follows


def folder_name(*parts: Any) -> str:
    """A relative path, in which ``..`` is replaced and the end of a name that is too long is replaced by its hash.

    OmegaConf passes a text with commas as several `parts`.
    """
    return "/".join(_shorten(name) for name in ",".join(map(str, parts)).split("/"))


def _shorten(name: str) -> str:
    if name == "..":
        return "__"
    data = name.encode()
    if len(data) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: MAX_NAME_BYTES - 9].decode(errors='ignore')}-{digest}"


def job_number(number: Any) -> int:
    """Number of a job in the folder of its sweep. A sweeper that counts from 0 continues after earlier jobs."""
    return int(number) + int(os.environ.get(FIRST_JOB, "0"))


def shorten_subdirs(arguments: Sequence[str]) -> list[str]:
    """Apply `folder_name` to a `hydra.sweep.subdir` of the command line, such as ``${hydra.job.override_dirname}``."""
    return [
        f"{SUBDIR}'${{folder_name:{a.removeprefix(SUBDIR)}}}'" if a.startswith(f"{SUBDIR}$") else a for a in arguments
    ]


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
OmegaConf.register_new_resolver("job_number", job_number, replace=True)
