"""Settings that must be the same in a checkpoint and in the run that resumes it."""

from collections.abc import Mapping
from typing import Any

Difference = Mapping[str, tuple[Any, Any]]  # key -> (value in the checkpoint, value in this run)
# Names in checkpoints of commit ae7d5c0 and earlier -> names now
_OLD_ORDER_NAMES = {"clips": "num_clips", "accumulate": "accumulate_grad_batches", "batches": "batches_per_epoch"}


def data_order(*, seed: int, num_clips: int, global_batch: int, accumulate_grad_batches: int) -> dict[str, int]:
    """The settings that decide which clips are in the batches before a position in an epoch."""
    return {
        "seed": seed,
        "num_clips": num_clips,
        "global_batch": global_batch,
        "accumulate_grad_batches": accumulate_grad_batches,
    }


def read_data_order(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored `data_order`, also one of an older version."""
    return rename_keys(stored, _OLD_ORDER_NAMES)


def rename_keys(stored: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`stored` with the keys of `names` replaced by their new names."""
    return {names.get(key, key): value for key, value in stored.items()}


def diff_settings(stored: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of both mappings whose values differ. Keys of one mapping only are ignored."""
    return {key: (stored[key], value) for key, value in own.items() if key in stored and stored[key] != value}


def format_difference(difference: Difference) -> str:
    """``key checkpoint / run, ...``, for error messages."""
    return ", ".join(f"{key} {stored} / {own}" for key, (stored, own) in difference.items())
