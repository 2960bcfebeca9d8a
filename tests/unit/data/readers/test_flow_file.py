"""Flow files: every storage type, its error and its size."""

from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import FLOW_DTYPES, read_flow, write_flow


@pytest.mark.parametrize("dtype", FLOW_DTYPES)
@pytest.mark.parametrize("largest", [0.0, 0.3, 60.0])
def test_written_flow_is_read_back_within_the_rounding_error(tmp_path: Path, dtype: str, largest: float) -> None:
    flow = np.random.default_rng(0).uniform(-largest, largest, size=(2, 24, 40)).astype(np.float32)
    path = tmp_path / "v" / "pair_00000.npy"
    path.parent.mkdir()
    write_flow(path, flow, dtype=dtype)
    bound = {"float32": 0, "float16": largest * 2**-11, "int16": largest / 32767 / 2, "int8": largest / 127 / 2}[dtype]
    assert np.abs(read_flow(path) - flow).max() <= bound * 1.001 + 1e-9
    assert list(path.parent.iterdir()) == [path]
    array = FlowReader(tmp_path, frame_size=(24, 40)).read("v", [0])
    assert np.abs(array[0] - flow).max() <= bound * 1.001 + largest * 2**-11 + 1e-7


def test_integer_flow_is_smaller(tmp_path: Path) -> None:
    flow = np.ones((2, 224, 398), np.float32)
    sizes = {}
    for dtype in FLOW_DTYPES:
        write_flow(tmp_path / dtype, flow, dtype=dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["float32"] / sizes["int8"] > 3.9
    assert sizes["float32"] / sizes["int16"] > 1.9


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    flow = np.zeros((2, 4, 6), np.float32)
    for value in (np.nan, np.inf, 1e6):
        flow[1, 2, 3] = value
        with pytest.raises(ValueError, match="not finite"):
            write_flow(tmp_path / "a.npy", flow, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_and_files_raise(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    with pytest.raises(ValueError, match="dtype 'int32' is not one of"):
        write_flow(path, np.zeros((2, 4, 6), np.float32), dtype="int32")
    with pytest.raises(ValueError, match=r"shape \(4, 6, 2\), expected"):
        write_flow(path, np.zeros((4, 6, 2), np.float32))
    np.savez(tmp_path / "a.npz", np.zeros(3))
    with pytest.raises(FrameError, match=r"an \.npz archive"):
        read_flow(tmp_path / "a.npz")
    np.save(path, np.zeros((), dtype=[("a", "<f4")]))
    with pytest.raises(FrameError, match="expected one record of scale and flow"):
        read_flow(path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x93NUMPY\x01\x00"])
def test_file_of_another_kind_is_reported_without_numpys_advice_to_unpickle_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(FrameError) as caught:
        read_flow(tmp_path / "a.npy")
    assert str(caught.value).endswith("a.npy: truncated, or not a .npy file of numbers; write this flow file again")
