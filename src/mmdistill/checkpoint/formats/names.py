"""Names of files and formats. Does not import torch, so that listing checkpoints is fast."""

import os
from enum import Enum
from pathlib import Path

META, MANIFEST, LATEST, TAG = "meta.json", "manifest.json", "latest", "checkpoint"
MODEL_STATES, OPTIM_STATES = "_model_states.pt", "_optim_states.pt"
FILE_SUFFIXES = (".ckpt", ".pt", ".pth", ".pth.tar", ".bin", ".safetensors")
SHARD_INDEX_SUFFIX = ".index.json"
# Weights in a folder of `save_pretrained`: one file, or the index of its shards. The first that exists is read.
HUGGINGFACE_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{SHARD_INDEX_SUFFIX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{SHARD_INDEX_SUFFIX}",
)
METADATA_KEY = "mmdistill"  # key of the metadata in a file
HEADS_KEY = "given_heads"  # key in the metadata: `heads` and `decoder_heads` of a model without other metadata
EXPORT_SUFFIXES = {"safetensors": ".safetensors", "hf": "", "onnx": ".onnx", "torch_export": ".pt2"}
TMP_PREFIX, TRASH_PREFIX = ".tmp-", ".trash-"


class CheckpointFormat(str, Enum):  # noqa: UP042 - prints as its value on every Python
    """Layout of a checkpoint on disk."""

    DEEPSPEED = "deepspeed"
    LIGHTNING = "lightning"
    WEIGHTS = "weights"
    SAFETENSORS = "safetensors"

    def __str__(self) -> str:
        """Return the value, as in messages."""
        return self.value


def is_tag(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory contains DeepSpeed's model files."""
    try:
        return any(name.endswith(MODEL_STATES) for name in os.listdir(directory))
    except OSError:
        return False


def rank_files(directory: Path, suffix: str) -> list[Path]:
    """List the files of a tag directory that end in `suffix`, by rank. No glob: the path may hold ``[`` or ``*``."""

    def key(name: str) -> tuple[int, str]:
        digits = name.partition("zero_pp_rank_")[2].partition("_")[0]
        return int(digits) if digits.isdigit() else 0, name

    return [directory / name for name in sorted(os.listdir(directory), key=key) if name.endswith(suffix)]


def state_files(tag: Path) -> list[Path]:
    """List the model files and optimizer shards of a tag directory."""
    return [*rank_files(tag, MODEL_STATES), *rank_files(tag, OPTIM_STATES)]
