import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import adam_step, read_zero_checkpoint
from mmdistill.checkpoint.formats.names import CheckpointFormat
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.locate import locate
from tests.contracts.checkpoint_contract import CheckpointFormatContract
from tests.unit.checkpoint.make_fixtures import FIXTURES

NAME = "epoch=01-loss=0.5000"
DIRECTORIES = [f"zero{s}-w{world}-{precision}" for s in range(4) for world in (1, 2) for precision in ("fp32", "bf16")]


class TestDeepSpeedDirectory(CheckpointFormatContract):
    format = CheckpointFormat.DEEPSPEED
    name = "epoch=03-loss=0.2500"
    files = ("checkpoint/mp_rank_00_model_states.pt", "latest", "meta.json", "manifest.json")

    def write(self, state: dict[str, Tensor], path: Path, meta: dict[str, Any]) -> None:
        write_deepspeed(state, path, meta)


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name].float(), tensor.float()), name


@pytest.mark.parametrize("name", DIRECTORIES)
def test_weights_are_those_that_deepspeed_reports(name: str) -> None:
    content = read_zero_checkpoint(locate(FIXTURES / name / NAME))
    same(content.weights, load_file(FIXTURES / name / "expected.safetensors"))
    assert (content.stage, content.world_size) == (int(name[4]), int(name[7]))
    assert content.client["global_steps"] == 2
    trained = [t for key, t in content.weights.items() if not key.startswith("decoder.norm.")]
    assert all(t.dtype is torch.float32 for t in trained)  # the masters, not the bf16 copies


def test_masters_differ_from_their_copies_and_round_to_them() -> None:
    location = locate(FIXTURES / "zero2-w2-bf16" / NAME)
    module = torch.load(location.model_files[0], weights_only=True)["module"]
    weights = read_zero_checkpoint(location).weights
    assert any(not torch.equal(weights[name], copy.float()) for name, copy in module.items())
    assert all(torch.equal(weights[name].to(copy.dtype), copy) for name, copy in module.items())


def test_model_file_without_its_shards(tmp_path: Path) -> None:
    source = FIXTURES / "zero1-w2-bf16" / NAME / "checkpoint" / "mp_rank_00_model_states.pt"
    shutil.copy(source, tmp_path)
    content = read_zero_checkpoint(locate(tmp_path / source.name))
    assert any("the low-precision weights are read" in note for note in content.notes)
    (tmp_path / "sharded").mkdir()
    shutil.copy(
        FIXTURES / "zero3-w1-fp32" / NAME / "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt", tmp_path / "sharded"
    )
    with pytest.raises(CheckpointError, match="stage 3 stores the weights in"):
        read_zero_checkpoint(locate(tmp_path / "sharded"))


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
        read_zero_checkpoint(locate(root))
    shard.unlink()
    with pytest.raises(CorruptCheckpointError, match="written by 2 ranks but 1 optimizer shard found"):
        read_zero_checkpoint(locate(root))


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
        read_zero_checkpoint(locate(root))


def test_model_parallel_directory_is_an_error(tmp_path: Path) -> None:
    torch.save({"module": {"a": torch.zeros(1)}}, tmp_path / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match=r"written with model parallelism \(mp_rank_01_model_states\.pt\)"):
        read_zero_checkpoint(locate(tmp_path))
