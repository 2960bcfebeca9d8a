"""Checkpoints: reading all formats, strict loading, atomic writing. See docs/checkpoint_formats.md.

Names that need torch are imported on first use, so that `find_checkpoints` does not import it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmdistill.checkpoint.errors import CheckpointError as CheckpointError
from mmdistill.checkpoint.errors import CorruptCheckpointError as CorruptCheckpointError
from mmdistill.checkpoint.errors import ResumeMismatchError as ResumeMismatchError
from mmdistill.checkpoint.errors import UnsafeCheckpointError as UnsafeCheckpointError
from mmdistill.checkpoint.errors import WeightMismatchError as WeightMismatchError
from mmdistill.checkpoint.find import CheckpointInfo as CheckpointInfo
from mmdistill.checkpoint.find import find_checkpoints as find_checkpoints
from mmdistill.checkpoint.formats.names import CheckpointFormat as CheckpointFormat

if TYPE_CHECKING:
    from mmdistill.checkpoint.deepspeed_engine import load_deepspeed as load_deepspeed
    from mmdistill.checkpoint.deepspeed_engine import save_deepspeed as save_deepspeed
    from mmdistill.checkpoint.formats.safetensors_file import save_safetensors as save_safetensors
    from mmdistill.checkpoint.load import LoadReport as LoadReport
    from mmdistill.checkpoint.lock import directory_lock as directory_lock
    from mmdistill.checkpoint.read import Checkpoint as Checkpoint
    from mmdistill.checkpoint.read import detect_format as detect_format
    from mmdistill.checkpoint.read import load_encoder as load_encoder
    from mmdistill.checkpoint.read import load_encoder_for_clips as load_encoder_for_clips
    from mmdistill.checkpoint.read import load_weights as load_weights
    from mmdistill.checkpoint.read import open_checkpoint as open_checkpoint
    from mmdistill.checkpoint.read import read_checkpoint as read_checkpoint
    from mmdistill.checkpoint.retention import latest_valid_checkpoint as latest_valid_checkpoint
    from mmdistill.checkpoint.retention import prune as prune
    from mmdistill.checkpoint.write import load_torch as load_torch
    from mmdistill.checkpoint.write import save_torch as save_torch

_NAMES = {
    "deepspeed_engine": ("load_deepspeed", "save_deepspeed"),
    "formats.safetensors_file": ("save_safetensors",),
    "load": ("LoadReport",),
    "lock": ("directory_lock",),
    "read": (
        "Checkpoint",
        "detect_format",
        "load_encoder",
        "load_encoder_for_clips",
        "load_weights",
        "open_checkpoint",
        "read_checkpoint",
    ),
    "retention": ("latest_valid_checkpoint", "prune"),
    "write": ("load_torch", "save_torch"),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
