import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdistill.checkpoint.convert import convert_checkpoint
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.names import CheckpointFormat
from mmdistill.checkpoint.formats.safetensors_file import (
    is_safetensors,
    read_safetensors,
    save_safetensors,
    verify_safetensors,
)
from mmdistill.checkpoint.keys import to_huggingface
from mmdistill.checkpoint.write import write_directory
from tests.contracts.checkpoint_contract import CheckpointFormatContract
from tests.unit.checkpoint.make_fixtures import FIXTURES


class TestSafetensorsFile(CheckpointFormatContract):
    format = CheckpointFormat.SAFETENSORS
    name = "model.safetensors"

    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        save_safetensors(state, path, meta)


class TestHuggingFaceFolder(CheckpointFormatContract):
    format = CheckpointFormat.SAFETENSORS
    name = "hf"
    files = ("model.safetensors",)

    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        encoder = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
        write_directory(
            path, lambda folder: save_safetensors(to_huggingface(encoder), folder / "model.safetensors", meta)
        )


def test_every_dtype_is_read_as_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    floats, integers = (
        ("float64", "float32", "float16", "bfloat16"),
        ("int64", "int32", "int16", "int8", "uint8", "bool"),
    )
    state = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in (*floats, *integers)}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    save_file(state, tmp_path / "library.safetensors")
    save_safetensors(state, tmp_path / "own.safetensors", {})
    for path in tmp_path.iterdir():
        for tensors in (read_safetensors(path).tensors, load_file(path)):
            assert sorted(tensors) == sorted(state)
            assert all(tensors[name].dtype == tensor.dtype for name, tensor in state.items())
            assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    save_safetensors({"a": torch.ones(3)}, tmp_path / "x.safetensors", {})
    before = (tmp_path / "x.safetensors").read_bytes()
    read_safetensors(tmp_path / "x.safetensors").tensors["a"].zero_()
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_content_decides_before_the_name(tmp_path: Path) -> None:
    path = convert_checkpoint(FIXTURES / "plain" / "bare.pt", tmp_path / "x.safetensors")
    assert is_safetensors(path.rename(tmp_path / "x.bin"))
    assert not is_safetensors(FIXTURES / "plain" / "bare.pt")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 6]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": ["0", "8"]},
        {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
        7,
    ],
)
def test_invalid_headers_are_errors(tmp_path: Path, entry: object) -> None:
    head = json.dumps({"encoder.norm.weight": entry}).encode()
    end = entry["data_offsets"][1] if isinstance(entry, dict) else 8
    (tmp_path / "x.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(int(end)))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        read_safetensors(tmp_path / "x.safetensors")


def test_sha256_of_older_versions_is_compared(tmp_path: Path) -> None:
    data = torch.arange(6.0)
    digest = {"format": "pt", "mmdistill_data_sha256": hashlib.sha256(data.numpy().tobytes()).hexdigest()}
    path = tmp_path / "old.safetensors"
    save_file({"encoder.norm.weight": data}, path, digest)
    content = read_safetensors(path)
    verify_safetensors(path, content)
    assert torch.equal(content.tensors["encoder.norm.weight"], data)
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    path.write_bytes(bytes(changed))
    with pytest.raises(CorruptCheckpointError, match="corrupt: checksum"):
        verify_safetensors(path, read_safetensors(path))
