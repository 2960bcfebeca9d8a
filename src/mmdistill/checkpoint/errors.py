"""What can be wrong with a checkpoint. Every message names the file and what to do."""

from mmdistill.errors import InputError


class CheckpointError(InputError):
    """A checkpoint cannot be used: it is missing, incomplete, of an unknown layout, or the request does not fit it."""


class CorruptCheckpointError(CheckpointError):
    """Bytes on disk are not the bytes that were written: truncated, flipped, or mixed from two saves."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle asks for something other than tensors and plain containers. Nothing of it was run."""


class WeightMismatchError(CheckpointError):
    """Tensors are missing, unexpected or of another shape. The module was not changed."""


class ResumeMismatchError(CheckpointError):
    """A raw DeepSpeed directory was written under another world size, ZeRO stage or precision."""
