""".npy files with numbers."""

import io
import math
from functools import lru_cache
from typing import Any

import numpy as np

from mmdistill.data.readers.base import FrameError


def read_npy(path: str) -> Any:
    """The result of ``np.load(path, allow_pickle=False)``, in half of its time.

    NumPy evaluates the text of each header. The files of a video have the same header, which is evaluated once here.

    Raises:
        ValueError, EOFError, OSError: as `np.load`.
    """
    data = np.fromfile(path, np.uint8)
    start = 10 + int.from_bytes(data[8:10].tobytes(), "little")  # format version 1.0
    if data[:8].tobytes() == b"\x93NUMPY\x01\x00" and len(data) >= start:
        shape, is_fortran, dtype = _parse_header(data[:start].tobytes())
        end = start + dtype.itemsize * math.prod(shape)
        if not (is_fortran or dtype.hasobject or len(data) < end):
            return data[start:end].view(dtype).reshape(shape)
    return np.load(path, allow_pickle=False)


@lru_cache(maxsize=64)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order is that of Fortran, and dtype."""
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, is_fortran, dtype


def load_npy(path: str, data: bytes) -> np.ndarray:
    """The array in the content of a ``.npy`` file. Nothing in it is executed.

    Raises:
        FrameError: the file is truncated, or not a .npy file of numbers; names `path`.
    """
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError):  # the text of NumPy advises to unpickle the file, which runs its code
        raise FrameError(f"{path}: truncated, or not a .npy file of numbers; write this file again") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise FrameError(f"{path}: not a .npy file of numbers; write this file again")
    return array
