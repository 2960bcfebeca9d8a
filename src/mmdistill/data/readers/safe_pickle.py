"""An unpickler for NumPy arrays and builtin containers that executes no other code.

A pickle can call any function. Skeleton files come from other machines, so only the names of an exact list may be
called; any other name raises an error before it is imported. The small functions below replace NumPy's constructors and
accept only what NumPy writes: a file could make the real ``numpy.ndarray`` execute code with a crafted object buffer.
"""

import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.data.readers.base import FrameError


class UnsafePickleError(FrameError):
    """A pickle that is damaged, or that needs more than arrays and containers. The message names the file."""


class _ArrayType:
    """Replaces ``numpy.ndarray``. The functions below take it as an argument; it is never called."""


def _empty_array(subtype: type, shape: tuple[int, ...], kind: bytes) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``: an empty array. The state that follows in the file fills it."""
    if subtype is not _ArrayType:
        raise UnsafePickleError("an array of a class other than numpy.ndarray")
    return np.empty((0,), dtype="u1")


def _from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``. NumPy itself rejects object dtypes."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, data: Any = None) -> Any:
    """``numpy.core.multiarray.scalar`` for numbers, booleans and text."""
    if isinstance(data, str):  # a byte string of Python 2
        data = data.encode("latin1")
    if dtype.hasobject or not isinstance(data, bytes):
        raise UnsafePickleError("a NumPy scalar of objects")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _dtype(kind: Any, align: bool = False, copy: bool = False) -> np.dtype:
    """``numpy.dtype`` from a type string: numbers, booleans, text, bytes and objects."""
    if not isinstance(kind, str) or kind[:1] not in "biufcUSO" or not kind[1:].isdigit():
        raise UnsafePickleError(f"the NumPy type {kind!r}")
    return np.dtype(kind, copy=True)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, which old protocols use for bytes."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise UnsafePickleError(f"the encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _empty_array
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer
for _module in ("builtins", "__builtin__"):
    _ALLOWED[_module, "bytes"] = lambda: b""  # old protocols use ``bytes()`` for empty bytes
    for _type in (list, dict, tuple, set, frozenset):
        _ALLOWED[_module, _type.__name__] = _type


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise UnsafePickleError(f"the name {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("a persistent id")


def load_pickle(path: Path) -> Any:
    """Load a pickle file of arrays, numbers, text and builtin containers. Byte strings of Python 2 become text.

    Raises:
        UnsafePickleError: the file needs a name outside the list (which is not executed), or is damaged or truncated.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except UnsafePickleError as error:
            raise UnsafePickleError(
                f"{path}: rejected because it needs {error}; only NumPy arrays and builtin containers are allowed"
            ) from None
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # a damaged pickle may raise IndexError, TypeError, UnicodeError, ...
            raise UnsafePickleError(f"{path}: not a complete pickle ({type(error).__name__}: {error})") from error
