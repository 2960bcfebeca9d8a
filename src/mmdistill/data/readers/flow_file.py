"""Flow files: ``.npy`` with float32 or float16 ``(2, H, W)`` in px, or whole numbers with a scale.

The compact form is one record ``[("scale", "<f4"), ("flow", "i1" | "<i2", (2, H, W))]``, meaning
``px = scale * flow``: 2 to 4 times smaller than float32, within half a `scale` of it.
"""

from pathlib import Path

import numpy as np

from mmdistill.errors import InputError
from mmdistill.files import atomic_open

FLOW_DTYPES = ("float32", "float16", "int16", "int8")


class FlowFileError(InputError):
    """A flow file that cannot be read; the message names it."""


def read_flow(path: Path | str) -> np.ndarray:
    """Flow in px, float32 or float16 (2, H, W), as stored.

    Raises `FlowFileError` for a truncated or foreign file, `OSError` where it cannot be opened.
    """
    try:
        stored = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise FlowFileError(f"{path}: not a whole .npy file ({error})") from error
    if not isinstance(stored, np.ndarray):
        raise FlowFileError(f"{path}: an .npz archive, expected .npy")
    if stored.dtype.names is not None:
        if set(stored.dtype.names) != {"scale", "flow"} or stored.shape != ():
            raise FlowFileError(f"{path}: fields {stored.dtype.names}, expected one record of scale and flow")
        return np.multiply(stored["flow"], stored["scale"], dtype=np.float32)
    if stored.dtype.kind != "f":
        raise FlowFileError(f"{path}: type {stored.dtype}; flow is float, or whole numbers with their scale")
    if stored.dtype.itemsize > 4 or not stored.dtype.isnative or not stored.flags.c_contiguous:
        return np.ascontiguousarray(stored, dtype=np.float32)
    return stored


def write_flow(path: Path | str, flow: np.ndarray, *, dtype: str = "float16") -> None:
    """Store flow, (2, H, W) in px; the file appears whole or not at all.

    Raises `ValueError` for an unknown `dtype`, another shape, or values that are not finite.
    """
    if dtype not in FLOW_DTYPES:
        raise ValueError(f"flow dtype {dtype!r} is not one of {', '.join(FLOW_DTYPES)}")
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise ValueError(f"{path}: flow of shape {flow.shape}, expected (2, height, width)")
    largest = float(np.abs(flow).max(initial=0.0))
    if not np.isfinite(largest) or (dtype == "float16" and largest > float(np.finfo(np.float16).max)):
        raise ValueError(f"{path}: flow that is not finite in {dtype}")
    if dtype.startswith("float"):
        stored = flow.astype(dtype)
    else:
        limit = np.iinfo(dtype).max
        scale = np.float32(largest / limit) if largest > 0 else np.float32(1)
        whole = np.clip(np.rint(flow / scale), -limit, limit).astype(np.dtype(dtype).newbyteorder("<"))
        stored = np.zeros((), dtype=[("scale", "<f4"), ("flow", whole.dtype, flow.shape)])
        stored["scale"], stored["flow"] = scale, whole
    with atomic_open(Path(path)) as file:
        np.save(file, stored, allow_pickle=False)
