"""A pickle reader that admits NumPy arrays and builtin containers, and runs nothing else.

A pickle is a program. Skeleton files come from other people's machines, so every name that a file wants to call is
looked up in an exact list; anything else is refused by name before a single call is made to it. Instead of NumPy's own
constructors the file gets the small functions below, which accept only what an honest array writes: the real
``numpy.ndarray``, called with a buffer of one's choice as objects, is a way to run code.
"""

import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill.errors import InputError


class UnsafePickleError(InputError):
    """A pickle that wants more than arrays and containers, or that is damaged; the message names the file."""


class _ArrayType:
    """Stands for ``numpy.ndarray`` in a file; an argument of the functions below, never called."""


def _empty_array(subtype: type, shape: tuple[int, ...], kind: bytes) -> np.ndarray:
    """``numpy.core.multiarray._reconstruct``: an empty array, filled by the state that follows in the file."""
    if subtype is not _ArrayType:
        raise UnsafePickleError("an array of a class other than numpy.ndarray")
    return np.empty((0,), dtype="u1")


def _from_buffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    """``numpy.core.numeric._frombuffer``. Object dtypes are refused by NumPy itself."""
    return np.frombuffer(buffer, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: np.dtype, data: Any = None) -> Any:
    """``numpy.core.multiarray.scalar`` for numbers, booleans and text."""
    if dtype.hasobject or not isinstance(data, bytes):
        raise UnsafePickleError("a NumPy scalar of objects")
    return np.frombuffer(data, dtype=dtype, count=1)[0]


def _dtype(kind: Any, align: bool = False, copy: bool = False) -> np.dtype:
    """``numpy.dtype`` from a type string: numbers, booleans, text, bytes and objects."""
    if not isinstance(kind, str) or kind[:1] not in "biufcUSO" or not kind[1:].isdigit():
        raise UnsafePickleError(f"the NumPy type {kind!r}")
    return np.dtype(kind, copy=True)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """``_codecs.encode``, with which old protocols write bytes."""
    if encoding not in ("latin1", "latin-1", "iso-8859-1"):
        raise UnsafePickleError(f"the encoding {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """``bytes()``, with which old protocols write empty bytes."""
    return b""


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
    _ALLOWED[_module, "bytes"] = _no_bytes
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
    """What `path` holds, if that is arrays, numbers, text and builtin containers.

    Raises:
        UnsafePickleError: for a name outside the list (no code of it runs), and for a damaged or truncated file.
        OSError: where the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            return _Unpickler(file).load()
        except UnsafePickleError as error:
            raise UnsafePickleError(
                f"{path}: refused, it asks for {error}; only NumPy arrays and builtin containers are read"
            ) from None
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # a damaged pickle raises nearly anything: IndexError, TypeError, UnicodeError, ...
            raise UnsafePickleError(f"{path}: not a whole pickle ({type(error).__name__}: {error})") from error
