"""Settings that must be the same in a checkpoint and in the run that resumes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdistill.config import ConfigError
from mmdistill.training.state import TrainingState

Record = Mapping[str, Mapping[str, Any]]  # weight_compat and data_order, see `check_compatible`


def diff_settings(stored: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """``key checkpoint / run, ...`` of the keys of both mappings whose values differ, for error messages."""
    different = [key for key, value in own.items() if key in stored and stored[key] != value]
    return ", ".join(f"{key} {stored[key]} / {own[key]}" for key in different)


def check_compatible(stored: Record, own: Record, state: TrainingState, checkpoint: Path | None) -> None:
    """Raise unless a checkpoint with the record `stored` and the position `state` continues in a run with `own`.

    ``weight_compat`` affects what the weights compute but not their shapes; it must always match. ``data_order``
    decides which clips are in the batches before a position; it must match inside an epoch.

    Raises:
        ConfigError: settings differ; gives the values in the checkpoint and in this run.
    """
    if difference := diff_settings(stored.get("weight_compat", {}), own["weight_compat"]):
        raise ConfigError(
            f"resume: {checkpoint} was trained with other settings than this run's (checkpoint / run): {difference}; "
            "use the same settings, or start from scratch with resume=null"
        )
    if state.batch and (difference := diff_settings(stored.get("data_order", {}), own["data_order"])):
        raise ConfigError(
            f"resume: the checkpoint was written in the middle of epoch {state.epoch}, and this run has different "
            f"batches (checkpoint / run): {difference}; use the same settings, or resume from the end of an epoch"
        )
