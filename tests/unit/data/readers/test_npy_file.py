""".npy files."""

import io
import re
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.npy_file import load_npy, read_npy


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


_RECORD = np.zeros((), dtype=[("scale", "<f4"), ("flow", "i1", (2, 3, 4))])
_MANY_FIELDS = np.zeros(2, dtype=[(f"a_field_with_a_long_name_{k}", "<f4") for k in range(2000)])  # format version 2.0


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3.5),
        np.zeros((0, 3)),
        np.arange(6.0).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.arange(5, dtype=">f4"),
        np.array([True, False]),
        _RECORD,
    ],
    ids=["scalar", "empty", "plain", "Fortran", "big-endian", "bool", "record"],
)
def test_file_is_read_as_by_numpy(array: np.ndarray, tmp_path: Path) -> None:
    path = str(tmp_path / "a.npy")
    np.save(path, array)
    for _ in range(2):  # the second call finds the header of the first
        found, expected = read_npy(path), np.load(path)
        assert (found.dtype, found.shape, found.flags.writeable) == (expected.dtype, expected.shape, True)
        assert found.tobytes() == expected.tobytes()
        found.fill(0)  # does not change the file


def test_unusual_files_are_left_to_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(_saved(np.arange(3)) + b"more")
    np.testing.assert_array_equal(read_npy(str(path)), np.arange(3))
    np.savez(tmp_path / "a.npz", a=np.zeros(2))
    assert read_npy(str(tmp_path / "a.npz")).files == ["a"]
    objects = _saved(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    long_header = _saved(_MANY_FIELDS)
    for data in (objects, b"", b"\x93NUMPY\x01\x00", _saved(np.zeros(9))[:-1], _saved(np.zeros(9))[:20], long_header):
        path.write_bytes(data)
        with pytest.raises((ValueError, EOFError)) as by_numpy:
            np.load(path)
        with pytest.raises(type(by_numpy.value), match=re.escape(str(by_numpy.value))):
            read_npy(str(path))
