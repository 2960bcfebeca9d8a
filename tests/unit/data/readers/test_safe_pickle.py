"""Malicious pickles are rejected by name and never executed."""

import pickle
import struct
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.safe_pickle import UnsafePickleError, load_pickle


class _CreatesFile:
    """Its pickle creates a file if it is loaded with `pickle.load`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_are_loaded(tmp_path: Path, protocol: int) -> None:
    data = {
        "keypoint": np.random.default_rng(0).normal(size=(2, 5, 17, 2)).astype(np.float32),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"),
        "scalar": np.float32(1.5),
        "objects": np.array([np.arange(3), None, "x"], dtype=object),
        "empty": np.zeros((0, 3)),
        "shape": (224, 398),
        "rest": [OrderedDict(a=1), defaultdict(list, b=[2]), {1, 2}, b"bytes", "text", None, True],
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    loaded = load_pickle(path)
    for key in ("keypoint", "fortran", "big", "empty"):
        assert loaded[key].dtype.newbyteorder("=") == data[key].dtype.newbyteorder("=")
        np.testing.assert_array_equal(loaded[key], data[key])
    assert loaded["scalar"] == 1.5
    assert loaded["objects"][2] == "x"
    assert loaded["rest"] == data["rest"]
    assert loaded["shape"] == data["shape"]


def test_files_of_numpy_1_are_loaded(tmp_path: Path) -> None:
    data = np.arange(4.0)
    text = pickle.dumps(data, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "a.pkl").write_bytes(text)
    np.testing.assert_array_equal(load_pickle(tmp_path / "a.pkl"), data)


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes text and bytes as Python 2 does, as byte strings."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_byte_string(self, value: str | bytes) -> None:
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_byte_string


def test_files_of_python_2_are_loaded(tmp_path: Path) -> None:
    data = {"keypoint": np.random.default_rng(0).normal(size=(2, 5)), "scalar": np.float32(1.5), "name": "text"}
    with (tmp_path / "a.pkl").open("wb") as file:
        _Python2Pickler(file, protocol=2).dump(data)
    loaded = load_pickle(tmp_path / "a.pkl")
    np.testing.assert_array_equal(loaded.pop("keypoint"), data.pop("keypoint"))
    assert loaded == data


def test_code_in_a_file_of_python_2_is_not_executed(tmp_path: Path) -> None:
    with (tmp_path / "a.pkl").open("wb") as file:
        _Python2Pickler(file, protocol=2).dump({"keypoint": _CreatesFile(tmp_path / "created")})
    with pytest.raises(UnsafePickleError, match="rejected because it needs the name"):
        load_pickle(tmp_path / "a.pkl")
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("position", ["top", "dict", "object array", "defaultdict"])
def test_code_is_rejected_by_name_and_not_executed(tmp_path: Path, position: str) -> None:
    created = tmp_path / "created"
    unsafe = _CreatesFile(created)
    array = np.empty(1, dtype=object)
    array[0] = unsafe
    data = {
        "top": unsafe,
        "dict": {"keypoint": unsafe},
        "object array": array,
        "defaultdict": defaultdict(list, x=[unsafe]),
    }
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(data[position]))
    with pytest.raises(UnsafePickleError, match=r"a\.pkl: rejected because it needs the name"):
        load_pickle(path)
    assert not created.exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cposix\nsystem\n(S'true'\ntR.", "posix.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0dlist.__init__\x93.", "list.__init__"),  # a dotted name
        (b"\x80\x04\x8c\x12numpy.core.numeric\x8c\x0aos.listdir\x93.", "os.listdir"),
        (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "the encoding 'rot13'"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "a persistent id"),
    ],
)
def test_known_exploits_are_rejected(tmp_path: Path, program: bytes, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(UnsafePickleError, match=message):
        load_pickle(tmp_path / "a.pkl")


def test_buffer_is_not_read_as_objects(tmp_path: Path) -> None:
    """numpy.ndarray with a buffer and an object dtype would dereference pointers stored in the file."""
    call = b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'O8'\ntRC\x08AAAAAAAAtR."
    (tmp_path / "a.pkl").write_bytes(call)
    with pytest.raises(UnsafePickleError):
        load_pickle(tmp_path / "a.pkl")


def test_damaged_file_raises_an_error_that_names_it(tmp_path: Path) -> None:
    data = pickle.dumps({"keypoint": np.zeros((1, 4, 17, 2))})
    for length in (0, 1, len(data) // 2, len(data) - 1):
        (tmp_path / "a.pkl").write_bytes(data[:length])
        with pytest.raises(UnsafePickleError, match=r"a\.pkl: not a complete pickle"):
            load_pickle(tmp_path / "a.pkl")
