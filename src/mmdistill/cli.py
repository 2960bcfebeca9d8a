"""From a command line to one call with a valid config: shared by both entrypoints. Imports no torch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from mmdistill.config import DistillConfig, PretrainConfig, die, parse, quote_overrides, register_schemas

T = TypeVar("T", PretrainConfig, DistillConfig)
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def run_entrypoint(job: Callable[[T, str], None], schema: type[T], *, config_name: str) -> None:
    """Compose, validate, call ``job(config, run folder)``; wrong input ends with one line and status 2.

    Other ranks than 0 make no folder of their own: their clocks may differ, and rank 0's run folder is the run's.
    """
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0:
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises instead of printing, so that we can add near matches
    register_schemas()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def composed(cfg: DictConfig) -> None:
        job(parse(cfg, schema), HydraConfig.get().runtime.output_dir)

    try:
        composed()
    except (HydraException, OmegaConfBaseException) as error:
        die(error, schema)
    except ValueError as error:
        if not type(error).__module__.startswith("mmdistill."):
            raise  # not ours: a defect, which deserves its traceback
        die(error, schema)
