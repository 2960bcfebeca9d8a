import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import RawTensors, adam_step, read_model_states, read_zero_checkpoint
from mmdistill.checkpoint.formats.names import CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from tests.contracts.checkpoint_contract import CheckpointFormatContract
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME


class TestDeepSpeedDirectory(CheckpointFormatContract):
    format = CheckpointFormat.DEEPSPEED
    name = "epoch=03-loss=0.2500"
    files = ("checkpoint/mp_rank_00_model_states.pt", "latest", "meta.json", "manifest.json")

    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        write_deepspeed(state, path, meta)


def read(tag: Path) -> RawTensors:
    return read_zero_checkpoint(tag, read_model_states(tag))


def test_masters_differ_from_their_copies_and_round_to_them() -> None:
    tag = FIXTURES / "zero2-w2-bf16" / NAME / "checkpoint"
    module = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    weights = read(tag).weights
    assert any(not torch.equal(weights[name], copy.float()) for name, copy in module.items())
    assert all(torch.equal(weights[name].to(copy.dtype), copy) for name, copy in module.items())


@pytest.mark.parametrize("name", ["zero1-w2-bf16", "zero3-w2-fp32"])
def test_shards_of_two_steps_are_an_error(tmp_path: Path, name: str) -> None:
    """Stock DeepSpeed, killed between two ranks while it saved over a directory."""
    root = tmp_path / name
    shutil.copytree(FIXTURES / name / NAME, root)
    shard = next(f for f in (root / "checkpoint").iterdir() if "rank_1" in f.name and "optim" in f.name)
    content = read_torch_file(shard, mapped=False)
    assert adam_step(content) == 2
    optimizer = content["optimizer_state_dict"]
    inner = optimizer.get("base_optimizer_state", optimizer.get("optimizer_state_dict"))
    for entry in inner["state"].values():
        entry["step"] += 1
    for key in ("loss_scaler", "param_slice_mappings", "zero_stage"):  # stand-ins cannot be written back
        optimizer.pop(key, None)
    optimizer["zero_stage"] = int(name[4])
    torch.save(content, shard)
    with pytest.raises(CorruptCheckpointError, match="a mix of two saves: the optimizer shards are at steps 2, 3"):
        read(root / "checkpoint")
    shard.unlink()
    with pytest.raises(CorruptCheckpointError, match="written by 2 ranks but 1 optimizer shard found"):
        read(root / "checkpoint")


@pytest.mark.parametrize("key", ["single_partition_of_fp32_groups", "param_shapes"])
def test_missing_entry_is_named(tmp_path: Path, key: str) -> None:
    root = tmp_path / NAME
    shutil.copytree(FIXTURES / "zero1-w1-bf16" / NAME, root)
    for file in (root / "checkpoint").iterdir():
        content = dict(read_torch_file(file, mapped=False))
        if "optim" in file.name:
            optimizer = content["optimizer_state_dict"]
            kept = ("partition_count", "single_partition_of_fp32_groups", "base_optimizer_state")
            content = {"optimizer_state_dict": {"zero_stage": 1, **{k: optimizer[k] for k in kept if k != key}}}
        content.pop(key, None)
        torch.save(content, file)
    with pytest.raises(
        CorruptCheckpointError, match=rf"checkpoint: its files do not have the layout of .*'{key}' is missing"
    ):
        read(root / "checkpoint")


def test_model_parallel_directory_is_an_error(tmp_path: Path) -> None:
    torch.save({"module": {"a": torch.zeros(1)}}, tmp_path / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"written with model parallelism \(mp_rank_01_model_states\.pt\)"):
        read(tmp_path)
