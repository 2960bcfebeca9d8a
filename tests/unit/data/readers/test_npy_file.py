"""Numbers from the bytes of .npy files."""

import io

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.npy_file import load_npy


def _saved(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint8", "int64", "bool"])
def test_numbers_are_read(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = load_npy("a.npy", _saved(array))
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_objects_text_and_archives_raise() -> None:
    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(2))
    objects = _saved(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for data in (objects, _saved(np.array(["text"])), archive.getvalue(), b"", b"text", _saved(np.zeros(9))[:-1]):
        with pytest.raises(FrameError, match=r"^a\.npy: .*not a \.npy file of numbers; write this file again$"):
            load_npy("a.npy", data)
