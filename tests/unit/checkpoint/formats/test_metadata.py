"""Metadata of checkpoints, read without tensors and without torch."""

import os
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import save_safetensors, save_torch
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.formats.metadata import read_stored_meta

META = {"kind": "distill", "loss": 0.5, "config": {"data_module": {"k_shot": [1, 5]}}}
STATE = {"a.weight": torch.ones(2, dtype=torch.float16), "b": torch.nn.Parameter(torch.zeros(1))}


class Command:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_metadata_of_every_format(tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([STATE["b"]])
    optimizer.param_groups[0]["path"] = Path("x")
    save_torch({"state_dict": STATE, "optimizer": optimizer.state_dict(), "mmdistill": META}, tmp_path / "a.ckpt")
    tensors = {name: tensor.detach() for name, tensor in STATE.items()}
    save_safetensors(tensors, tmp_path / "a.safetensors", META)
    write_deepspeed(tensors, tmp_path / "a", META)
    for name in ("a.ckpt", "a.safetensors", "a"):
        found = read_stored_meta(tmp_path / name)
        assert {key: found[key] for key in META} == META


@pytest.mark.parametrize("cut", [10, 100])
def test_damaged_and_other_files_have_no_metadata(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"mmdistill": META}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    (tmp_path / "folder").mkdir()
    torch.save(["no", "dict"], tmp_path / "list.pt")
    for name in ("a.ckpt", "folder", "list.pt", "absent.safetensors"):
        assert read_stored_meta(tmp_path / name) == {}


def test_no_code_of_a_pickle_is_executed(tmp_path: Path) -> None:
    torch.save({"x": Command(tmp_path / "created"), "mmdistill": META}, tmp_path / "a.ckpt")
    assert read_stored_meta(tmp_path / "a.ckpt") == META
    assert not (tmp_path / "created").exists()
