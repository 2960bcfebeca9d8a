"""Settings that must be the same in a checkpoint and in the run that resumes it."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdistill.config import ConfigError
from mmdistill.training.state import TrainingState

_EARLIER_SETTINGS = {"resize": "crop", "pooling": "mean"}  # of checkpoints that do not store these keys
Record = Mapping[str, Mapping[str, Any]]  # weight_compat and data_order, see `check_compatible`


def diff_settings(stored: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """``key checkpoint / run, ...`` of the keys of both mappings whose values differ, for error messages."""
    different = [key for key, value in own.items() if key in stored and stored[key] != value]
    return ", ".join(f"{key} {stored[key]} / {own[key]}" for key in different)


def convert_position(stored: Mapping[str, Any], own_order: Mapping[str, int]) -> dict[str, Any]:
    """The training state `stored` with its position counted in the batches of a run with the order `own_order`.

    Both divide the same clips into optimizer steps if batch size x processes x accumulated batches is the same.
    Otherwise the state is returned unchanged.
    """
    order, sizes = stored.get("data_order", {}), ("global_batch", "accumulate_grad_batches")
    if not all(key in order for key in (*sizes, "batches_per_epoch")):
        return dict(stored)
    clips_per_step = [math.prod(o[key] for key in sizes) for o in (order, own_order)]
    if clips_per_step[0] != clips_per_step[1]:
        return dict(stored)

    def own_batches(batches: int) -> int:
        return batches * int(order["global_batch"]) // own_order["global_batch"]

    own = {key: own_order[key] for key in sizes} | {"batches_per_epoch": own_batches(order["batches_per_epoch"])}
    return {**stored, "batch": own_batches(stored["batch"]), "data_order": {**order, **own}}


def require_same_settings(stored: Mapping[str, Any], own: Mapping[str, Any], checkpoint: Path | None) -> None:
    """Raise `ConfigError` if settings that the weights depend on differ; gives both values."""
    if difference := diff_settings(stored, own):
        raise ConfigError(
            f"resume: {checkpoint} was trained with other settings than this run's (checkpoint / run): {difference}; "
            "use the same settings, or start from scratch with resume=null"
        )


def check_weight_compat(stored: Record, own: Record, checkpoint: Path | None) -> None:
    """Raise unless the weights of a checkpoint with the record `stored` compute the same in a run with `own`.

    ``weight_compat`` are settings that the weights depend on. A distillation checks them before it loads tensors,
    because some poolings change the shapes of the transfer head.

    Raises:
        ConfigError: settings differ; gives the values in the checkpoint and in this run.
    """
    require_same_settings({**_EARLIER_SETTINGS, **stored.get("weight_compat", {})}, own["weight_compat"], checkpoint)


def check_compatible(stored: Record, own: Record, state: TrainingState, checkpoint: Path | None) -> None:
    """Raise unless a checkpoint with the record `stored` and the position `state` continues in a run with `own`.

    ``weight_compat`` must always match. ``data_order`` decides which clips are in the batches before a position; it
    must match inside an epoch.

    Raises:
        ConfigError: settings differ; gives the values in the checkpoint and in this run.
    """
    check_weight_compat(stored, own, checkpoint)
    if state.batch and (difference := diff_settings(stored.get("data_order", {}), own["data_order"])):
        raise ConfigError(
            f"resume: the checkpoint was written in the middle of epoch {state.epoch}, and this run has different "
            f"batches (checkpoint / run): {difference}; use the same settings (global_batch is batch_size x "
            "processes), or resume from the end of an epoch"
        )
