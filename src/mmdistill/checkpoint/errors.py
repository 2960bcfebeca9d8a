"""Errors of the checkpoint layer. Each message names the file and a way to fix the problem."""

from collections.abc import Iterator
from contextlib import contextmanager

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


class ComponentError(CheckpointError):
    """A checkpoint has no encoder of the selected name, or several encoders and no selection."""


@contextmanager
def name_setting(setting: str, error_class: type[CheckpointError] = CheckpointError) -> Iterator[None]:
    """Begin the message of an error of `error_class` with `setting`: the config key or option that the user has set."""
    try:
        yield
    except error_class as error:
        if str(error).startswith(f"{setting}: "):
            raise
        raise type(error)(f"{setting}: {error}") from error
