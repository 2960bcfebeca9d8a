"""Names of files and of formats. Imports nothing heavy: listing checkpoints must not wait for torch."""

from enum import Enum

META, MANIFEST, LATEST, TAG = "meta.json", "manifest.json", "latest", "checkpoint"
MODEL_STATES, OPTIM_STATES = "_model_states.pt", "_optim_states.pt"
FILE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
TMP_PREFIX, OLD_PREFIX, TRASH_PREFIX = ".tmp-", ".old-", ".trash-"


class CheckpointFormat(str, Enum):  # noqa: UP042 - prints as its value on every Python
    """How a checkpoint is laid out on disk."""

    DEEPSPEED = "deepspeed"
    LIGHTNING = "lightning"
    WEIGHTS = "weights"

    def __str__(self) -> str:
        return self.value
