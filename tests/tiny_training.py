"""A `Training` of a distillation on tiny data, without a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.configs
from mmdistill.checkpoint.read import Checkpoint, CheckpointFormat
from mmdistill.config import DistillConfig
from mmdistill.distributed.process import Process
from mmdistill.training.run import Run, Training
from mmdistill.training.run_logger import RunLog
from mmdistill.training.train_data import make_train_data
from tests.tiny_data import overrides

MakeTraining = Callable[..., Training]  # the fixture `make` of the unit tests


def distill_config(data: Path, *more: str) -> DistillConfig:
    """Batches of 3 clips; the teachers do not exist."""
    return tests.configs.distill_config(*overrides(data), "batch_size=3", "accelerator=cpu", *more)


def make_training(
    data: Path, run_dir: Path, *more: str, signal: int | None = None, source: Path | None = None, **meta: Any
) -> Training:
    """A training that has received `signal` and resumes from `source` with the metadata `meta`."""
    config, process = distill_config(data, *more), Process(torch.device("cpu"), 0, 1)
    resumed = Checkpoint(source, CheckpointFormat.LIGHTNING, source, content={"mmdistill": meta}) if source else None
    run = Run(run_dir, process, "32", resumed)
    log = RunLog(run_dir, title="t", total_steps=1)
    return Training(config, run, make_train_data(config, ("rgb",), process), log, lambda: signal, {})
