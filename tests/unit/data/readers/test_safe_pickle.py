"""Hostile pickles: refused by name, and nothing of them runs."""

import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.safe_pickle import UnsafePickleError, load_pickle


class _Touch:
    """A pickle of this makes a file when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_come_back(tmp_path: Path, protocol: int) -> None:
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
    back = load_pickle(path)
    for key in ("keypoint", "fortran", "big", "empty"):
        assert back[key].dtype.newbyteorder("=") == data[key].dtype.newbyteorder("=")
        np.testing.assert_array_equal(back[key], data[key])
    assert back["scalar"] == 1.5
    assert back["objects"][2] == "x"
    assert back["rest"] == data["rest"]
    assert back["shape"] == data["shape"]


def test_files_of_numpy_1_are_read(tmp_path: Path) -> None:
    data = np.arange(4.0)
    text = pickle.dumps(data, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "a.pkl").write_bytes(text)
    np.testing.assert_array_equal(load_pickle(tmp_path / "a.pkl"), data)


@pytest.mark.parametrize("inside", ["top", "dict", "object array", "defaultdict"])
def test_code_is_refused_by_name_and_does_not_run(tmp_path: Path, inside: str) -> None:
    trap = tmp_path / "ran"
    bad = _Touch(trap)
    array = np.empty(1, dtype=object)
    array[0] = bad
    data = {"top": bad, "dict": {"keypoint": bad}, "object array": array, "defaultdict": defaultdict(list, x=[bad])}
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(data[inside]))
    with pytest.raises(UnsafePickleError, match=r"a\.pkl: refused, it asks for the name"):
        load_pickle(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (b"cposix\nsystem\n(S'true'\ntR.", "posix.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0dlist.__init__\x93.", "list.__init__"),  # a dotted name
        (b"\x80\x04\x8c\x12numpy.core.numeric\x8c\x0aos.listdir\x93.", "os.listdir"),
        (b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.", "the encoding 'rot13'"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "a persistent id"),
    ],
)
def test_known_tricks_are_refused(tmp_path: Path, program: bytes, named: str) -> None:
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(UnsafePickleError, match=named):
        load_pickle(tmp_path / "a.pkl")


def test_a_buffer_never_becomes_objects(tmp_path: Path) -> None:
    """numpy.ndarray called with a buffer and an object type would follow pointers of the file's choice."""
    call = b"cnumpy\nndarray\n((I1\ntcnumpy\ndtype\n(S'O8'\ntRC\x08AAAAAAAAtR."
    (tmp_path / "a.pkl").write_bytes(call)
    with pytest.raises(UnsafePickleError):
        load_pickle(tmp_path / "a.pkl")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = pickle.dumps({"keypoint": np.zeros((1, 4, 17, 2))})
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.pkl").write_bytes(whole[:length])
        with pytest.raises(UnsafePickleError, match=r"a\.pkl: not a whole pickle"):
            load_pickle(tmp_path / "a.pkl")
