"""Flow files: ``.npy`` with float32 or float16 ``(2, H, W)`` in px, or integers with a scale.

The integer form is one record ``[("scale", "<f4"), ("flow", "i1" | "<i2", (2, H, W))]`` with ``px = scale * flow``. It
is 2 to 4 times smaller than float32, and its error is at most half the scale. `pack_flow` writes the flow of a video to
one file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mmdistill.data.readers.base import FrameError, file_errors
from mmdistill.data.readers.image_file import image_format
from mmdistill.data.readers.npy_file import read_npy
from mmdistill.files import atomic_open

PACKED_FLOW = "flow.npy"  # in the folder of a video: its files in one, see `pack_flow`
FLOW_DTYPES = ("float32", "float16", "int16", "int8")


def read_flow(path: Path | str) -> np.ndarray:
    """Flow in px as stored, float32 or float16 (2, H, W).

    Raises:
        FrameError: the file is missing, truncated or not a flow file.
    """
    return flow_in_px(_load(path, None), path)


def open_packed_flow(path: Path | str) -> np.ndarray:
    """Memory-map a file of `pack_flow`. (T, ...); `flow_in_px` converts a row to px.

    Raises:
        FrameError: the file is missing, truncated or not a file of `pack_flow`.
    """
    stored = _load(path, "c")  # a private mapping, because torch warns about read-only arrays
    if not isinstance(stored, np.ndarray) or stored.ndim != (4 if stored.dtype.names is None else 1):
        raise FrameError(f"{path}: expected the flow of all frames, (T, 2, height, width) or T records")
    return stored


def _load(path: Path | str, mmap_mode: Literal["c"] | None) -> np.ndarray:
    with file_errors(str(path), "flow"):
        try:
            stored: np.ndarray = (
                np.load(path, mmap_mode=mmap_mode, allow_pickle=False) if mmap_mode else read_npy(str(path))
            )
        except (ValueError, EOFError):  # the text of NumPy advises to unpickle the file, which runs its code
            with open(path, "rb") as file:
                is_image = image_format(file.read(8)) is not None
            if is_image:
                raise FrameError(
                    f"{path}: an image; for flow in pairs of images set data_module.flow_pattern to their file name "
                    "with {axis}, and data_module.flow_bound"
                ) from None
            raise FrameError(f"{path}: truncated, or not a .npy file of numbers; write this flow file again") from None
    return stored


def flow_in_px(stored: np.ndarray, path: Path | str) -> np.ndarray:
    """Flow in px from the content of a file: float32 or float16 (2, H, W).

    Raises:
        FrameError: the content is not flow; names `path`.
    """
    if not isinstance(stored, np.ndarray):
        raise FrameError(f"{path}: an .npz archive, expected .npy")
    if stored.dtype.names is not None:
        if set(stored.dtype.names) != {"scale", "flow"} or stored.shape != ():
            raise FrameError(f"{path}: fields {stored.dtype.names}, expected one record of scale and flow")
        flow: np.ndarray = np.multiply(stored["flow"], stored["scale"], dtype=np.float32)
        return flow
    if stored.dtype.kind != "f":
        raise FrameError(f"{path}: type {stored.dtype}; flow must be float, or integers with a scale")
    if stored.dtype.itemsize > 4 or not stored.dtype.isnative or not stored.flags.c_contiguous:
        return np.ascontiguousarray(stored, dtype=np.float32)
    return stored


def write_flow(path: Path | str, flow: np.ndarray, *, dtype: str = "float16") -> None:
    """Write flow, (2, H, W) in px, atomically, as one of `FLOW_DTYPES`.

    Raises:
        ValueError: the dtype is unknown, the shape is wrong, or a value is not finite in `dtype`.
    """
    if dtype not in FLOW_DTYPES:
        raise ValueError(f"flow dtype {dtype!r} is not one of {', '.join(FLOW_DTYPES)}")
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise ValueError(f"{path}: flow of shape {flow.shape}, expected (2, height, width)")
    largest = float(np.abs(flow).max(initial=0.0))
    if not np.isfinite(largest) or (dtype == "float16" and largest > float(np.finfo(np.float16).max)):
        raise ValueError(f"{path}: flow values that are not finite in {dtype}")
    if dtype.startswith("float"):
        stored = flow.astype(dtype)
    else:
        limit = np.iinfo(dtype).max
        scale = np.float32(largest / limit) if largest > 0 else np.float32(1)
        integers = np.clip(np.rint(flow / scale), -limit, limit).astype(np.dtype(dtype).newbyteorder("<"))
        stored = np.zeros((), dtype=[("scale", "<f4"), ("flow", integers.dtype, flow.shape)])
        stored["scale"], stored["flow"] = scale, integers
    with atomic_open(Path(path)) as file:
        np.save(file, stored, allow_pickle=False)


def pack_flow(path: Path, files: Sequence[Path]) -> None:
    """Write flow files of one format and size to one file, atomically, in the order of their names.

    The file contains the same numbers: float (T, 2, H, W), or T records of scale and flow.

    Raises:
        FrameError: a file cannot be read.
        ValueError: the files differ in format or size.
    """
    files = sorted(files)
    first = _load(files[0], None)
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    with atomic_open(path) as file:
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(files), *first.shape)})
        for source in files:
            stored = _load(source, None)
            if (stored.dtype, stored.shape) != (first.dtype, first.shape):
                raise ValueError(f"{source}: another format or size than {files[0]}; write both with one --flow-dtype")
            file.write(stored.tobytes())
