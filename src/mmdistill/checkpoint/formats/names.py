"""Names of files and formats. Does not import torch, so that listing checkpoints is fast."""

from enum import Enum

META, MANIFEST, LATEST, TAG = "meta.json", "manifest.json", "latest", "checkpoint"
MODEL_STATES, OPTIM_STATES = "_model_states.pt", "_optim_states.pt"
FILE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
METADATA_KEY = "mmdistill"  # key of the metadata in a file
EXPORT_SUFFIXES = {
    "safetensors": ".safetensors",
    "hf": "",
    "onnx": ".onnx",
    "torch_export": ".pt2",
}  # of export formats
TMP_PREFIX, OLD_PREFIX, TRASH_PREFIX = ".tmp-", ".old-", ".trash-"


class CheckpointFormat(str, Enum):  # noqa: UP042 - prints as its value on every Python
    """Layout of a checkpoint on disk."""

    DEEPSPEED = "deepspeed"
    LIGHTNING = "lightning"
    WEIGHTS = "weights"

    def __str__(self) -> str:
        """Return the value, as in messages."""
        return self.value
