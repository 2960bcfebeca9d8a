"""Errors of the checkpoint layer. Each message names the file and a way to fix the problem."""

from mmdistill.errors import InputError


class CheckpointError(InputError):
    """A checkpoint cannot be used: missing, incomplete, of an unknown format, or unsuitable for the request."""


class CorruptCheckpointError(CheckpointError):
    """The bytes on disk differ from those that were written: truncated, flipped, or mixed from two saves."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle references something other than tensors and plain containers. None of its code was executed."""


class WeightMismatchError(CheckpointError):
    """Tensors are missing, unexpected or of another shape. The module was not changed."""


class ResumeMismatchError(CheckpointError):
    """A raw DeepSpeed directory was written with another world size, ZeRO stage or precision."""
