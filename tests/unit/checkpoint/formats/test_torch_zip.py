import argparse
import os
import zipfile
from collections import defaultdict
from fractions import Fraction
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from mmdistill.checkpoint.formats.names import METADATA_KEY, CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import (
    directory_digest,
    is_zip,
    read_torch_file,
    sha256_file,
    verify_zip,
)
from mmdistill.checkpoint.write import save_torch
from tests.checkpoint_files import zip_records
from tests.contracts.checkpoint_contract import CheckpointFormatContract
from tests.unit.checkpoint.make_fixtures import FIXTURES


class TestLightningFile(CheckpointFormatContract):
    format = CheckpointFormat.LIGHTNING
    name = "epoch=03-train_loss=0.2500.ckpt"

    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        content = {"state_dict": state, "pytorch-lightning_version": "2", "epoch": 3, "global_step": 40}
        save_torch({**content, METADATA_KEY: meta}, path)


class TestWeightsFile(CheckpointFormatContract):
    format = CheckpointFormat.WEIGHTS
    name = "weights.pt"

    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        save_torch({"model": state, METADATA_KEY: meta}, path)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("verify", [True, False])
def test_content_is_that_of_torch_load(verify: bool, mapped: bool) -> None:
    for name in ("model.pth", "legacy.pth"):
        path = FIXTURES / "plain" / name
        content, expected = read_torch_file(path, verify=verify, mapped=mapped), torch.load(path, weights_only=True)
        assert content.keys() == expected.keys()
        assert all(torch.equal(content["model"][key], tensor) for key, tensor in expected["model"].items())


def test_digest_of_the_directory_changes_with_one_bit_of_a_tensor(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0000001)):
        (tmp_path / name).mkdir()
        torch.save({"x": torch.tensor([value])}, tmp_path / name / "x.pt")
    a, b, c = (directory_digest(tmp_path / name / "x.pt") for name in "abc")
    assert a == b != c
    assert sha256_file(tmp_path / "a" / "x.pt") == sha256_file(tmp_path / "b" / "x.pt")


def test_each_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.arange(4.0)}, path)
    clean = path.read_bytes()
    record = next(record for record in zip_records(path) if record.name.endswith("data/0"))
    for offset in range(record.size):
        data = bytearray(clean)
        data[record.start + offset] ^= 1 << offset % 8
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptCheckpointError, match=r"corrupt: checksum of .*data/0 does not match"):
            verify_zip(path)
    path.write_bytes(clean)
    verify_zip(path)


def test_compressed_archives_and_other_bytes_are_errors(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000000)
    assert is_zip(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="compressed archive"):
        read_torch_file(tmp_path / "x.ckpt")
    (tmp_path / "y.ckpt").write_bytes(b"hello world")
    assert not is_zip(tmp_path / "y.ckpt")
    with pytest.raises(CorruptCheckpointError, match=r"y\.ckpt: not a torch file"):
        read_torch_file(tmp_path / "y.ckpt")


def test_other_classes_are_rejected_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "part": Fraction(1, 2)}, tmp_path / "x.ckpt")
    with pytest.raises(UnsafeCheckpointError, match=r"rejected: .*'fractions\.Fraction'.*no code was executed"):
        read_torch_file(tmp_path / "x.ckpt")


class _Command:
    """An object whose pickle runs a shell command when it is read."""

    def __init__(self, target: Path) -> None:
        self.command = f"touch {target}"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def _omegaconf_with_interpolation() -> Any:
    config = OmegaConf.create(
        {"lr": 1e-3, "sizes": [2, 2.5, "x", True, None], "model": {"lr": "${lr}"}, "dir": Path("a")}
    )
    assert config.model.lr == config.lr
    return config


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(lr=1e-3, out=Path("a"), windows=PureWindowsPath("c:/a"), betas=[0.9, 0.95]),
        {
            "epoch": np.int64(3),
            "best": np.float32(0.5),
            "flag": np.bool_(True),
            "rng": np.random.RandomState(0).get_state(),
        },
        _omegaconf_with_interpolation(),
        defaultdict(list, {"a": [1]}),
    ],
    ids=["argparse", "numpy", "omegaconf", "defaultdict"],
)
@pytest.mark.parametrize("is_zip", [True, False])
def test_arguments_and_training_state_are_replaced_by_stand_ins(tmp_path: Path, value: Any, is_zip: bool) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "args": value}, tmp_path / "x", _use_new_zipfile_serialization=is_zip)
    content = read_torch_file(tmp_path / "x")
    assert torch.equal(content["model"]["a"], torch.ones(2))
    types = {type(content["args"])} | {type(v) for v in getattr(content["args"], "__dict__", {}).values()}
    assert {t.__module__ for t in types} <= {"builtins", "mmdistill.checkpoint.formats.torch_zip"}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("is_nested", [True, False])
def test_a_command_in_a_checkpoint_is_rejected_and_not_executed(tmp_path: Path, is_nested: bool, is_zip: bool) -> None:
    command = _Command(tmp_path / "executed")
    args = argparse.Namespace(lr=command, out=Path("a")) if is_nested else command
    torch.save({"model": {}, "args": args}, tmp_path / "x.pth", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UnsafeCheckpointError, match=rf"rejected: .*'{os.name}\.system'.*no code was executed"):
        read_torch_file(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["eval", "exec", "getattr", "__import__"])
def test_builtin_functions_are_rejected(tmp_path: Path, name: str) -> None:
    pickled = f"c__builtin__\n{name}\n(S'1'\ntR.".encode()
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "y.pt", "w") as target:
        for record in source.namelist():
            target.writestr(record, pickled if record.endswith("data.pkl") else source.read(record))
    with pytest.raises(UnsafeCheckpointError, match=name):
        read_torch_file(tmp_path / "y.pt")


def test_deepspeed_classes_are_replaced_by_stand_ins() -> None:
    shard = FIXTURES / "zero1-w1-fp32" / "epoch=01-loss=0.5000" / "checkpoint"
    content = read_torch_file(next(path for path in shard.iterdir() if "optim" in path.name))
    modules = {type(value).__module__ for value in content["optimizer_state_dict"].values()}
    assert not any(module.startswith("deepspeed") for module in modules)
