"""Checkpoints: reading all formats, strict loading, atomic writing. See docs/checkpoint_formats.md.

Names are imported on first use, so that `find_checkpoints` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmdistill.checkpoint.deepspeed_engine import load_deepspeed, save_deepspeed
    from mmdistill.checkpoint.errors import (
        CheckpointError,
        CorruptCheckpointError,
        ResumeMismatchError,
        UnsafeCheckpointError,
        WeightMismatchError,
    )
    from mmdistill.checkpoint.find import CheckpointInfo, find_checkpoints
    from mmdistill.checkpoint.formats.names import CheckpointFormat
    from mmdistill.checkpoint.load import (
        LoadReport,
        load_encoder,
        load_encoder_for_clips,
        load_encoder_with_report,
        load_weights,
    )
    from mmdistill.checkpoint.locate import detect_format
    from mmdistill.checkpoint.lock import directory_lock
    from mmdistill.checkpoint.read import Checkpoint, read_checkpoint
    from mmdistill.checkpoint.retention import latest_valid_checkpoint, prune
    from mmdistill.checkpoint.write import load_torch, save_safetensors, save_torch

_MODULE_OF = {
    "Checkpoint": "read",
    "CheckpointError": "errors",
    "CheckpointFormat": "formats.names",
    "CheckpointInfo": "find",
    "CorruptCheckpointError": "errors",
    "LoadReport": "load",
    "ResumeMismatchError": "errors",
    "UnsafeCheckpointError": "errors",
    "WeightMismatchError": "errors",
    "detect_format": "locate",
    "directory_lock": "lock",
    "find_checkpoints": "find",
    "load_deepspeed": "deepspeed_engine",
    "load_encoder": "load",
    "load_encoder_for_clips": "load",
    "load_encoder_with_report": "load",
    "load_torch": "write",
    "load_weights": "load",
    "latest_valid_checkpoint": "retention",
    "prune": "retention",
    "read_checkpoint": "read",
    "save_deepspeed": "deepspeed_engine",
    "save_safetensors": "write",
    "save_torch": "write",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointFormat",
    "CheckpointInfo",
    "CorruptCheckpointError",
    "LoadReport",
    "ResumeMismatchError",
    "UnsafeCheckpointError",
    "WeightMismatchError",
    "detect_format",
    "directory_lock",
    "find_checkpoints",
    "latest_valid_checkpoint",
    "load_deepspeed",
    "load_encoder",
    "load_encoder_for_clips",
    "load_encoder_with_report",
    "load_torch",
    "load_weights",
    "prune",
    "read_checkpoint",
    "save_deepspeed",
    "save_safetensors",
    "save_torch",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
