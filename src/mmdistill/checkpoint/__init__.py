"""The checkpoint layer: every format in, no weight lost, nothing half-written. See docs/checkpoint_formats.md."""

from mmdistill.checkpoint.detect import CheckpointFormat, detect_format
from mmdistill.checkpoint.engine import load_deepspeed, save_deepspeed
from mmdistill.checkpoint.errors import (
    CheckpointError,
    CorruptCheckpointError,
    ResumeMismatchError,
    UnsafeCheckpointError,
    WeightMismatchError,
)
from mmdistill.checkpoint.find import CheckpointInfo, find_checkpoints
from mmdistill.checkpoint.load import LoadReport, load_encoder, load_encoder_with_report, load_weights
from mmdistill.checkpoint.read import Checkpoint, read_checkpoint
from mmdistill.checkpoint.retention import directory_lock, newest_complete, prune
from mmdistill.checkpoint.write import load_torch, save_safetensors, save_torch

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
    "load_deepspeed",
    "load_encoder",
    "load_encoder_with_report",
    "load_torch",
    "load_weights",
    "newest_complete",
    "prune",
    "read_checkpoint",
    "save_deepspeed",
    "save_safetensors",
    "save_torch",
]
