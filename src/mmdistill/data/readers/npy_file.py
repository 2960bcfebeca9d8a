""".npy files with numbers, read from bytes."""

import io

import numpy as np

from mmdistill.data.readers.base import FrameError


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
