"""Training states in other slices, compared with the files that DeepSpeed wrote. Real engines: tests/integration."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdistill.checkpoint.convert import convert_layout, write_deepspeed
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError
from mmdistill.checkpoint.formats.deepspeed_zero import GROUP_NAMES, read_model_states
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from mmdistill.checkpoint.formats.zero_slices import (
    MASTERS,
    ZeroLayout,
    ZeroState,
    read_zero_state,
    slice_sizes,
    slice_tensors,
)
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME

SHAPES = [(3, 5), (7,), (1,), (2, 2, 4), (11,)]  # 50 values


def read(root: Path) -> ZeroState:
    tag = root / "checkpoint"
    return read_zero_state(tag, read_model_states(tag))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 60])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_slices_of_all_ranks_are_the_padded_vectors(stage: int, world_size: int) -> None:
    layout = ZeroLayout(stage, world_size)
    numbers = iter(range(1, 100))
    tensors = [torch.tensor([next(numbers) for _ in range(math.prod(s))]).float().view(s) for s in SHAPES]
    slices = [slice_tensors(tensors, layout, rank) for rank in range(world_size)]
    sizes = {len(part) for part, _ in slices}
    assert sizes == set(slice_sizes([{str(s): s for s in SHAPES}], layout))
    rows = torch.stack([part for part, _ in slices])
    if stage < 3:
        flat = rows.flatten().tolist()
        assert flat == [*map(float, range(1, 51)), *[0.0] * (len(flat) - 50)]
        assert len(flat) % (2 * world_size) == 0
        assert len(flat) - 50 < 2 * world_size
        assert sum(padding for _, padding in slices) == len(flat) - 50
    else:
        column = 0
        for tensor in tensors:
            width = math.ceil(tensor.numel() / world_size)
            flat = rows[:, column : column + width].flatten().tolist()
            assert flat == [*tensor.flatten().tolist(), *[0.0] * (width * world_size - tensor.numel())]
            column += width
        assert sizes == {column}


def entries(root: Path) -> dict[str, dict[str, Any]]:
    """Content of each file. Values that DeepSpeed does not read when it loads are removed."""
    out = {file.name: dict(read_torch_file(file)) for file in (root / "checkpoint").iterdir()}
    for content in out.values():
        optimizer = content.get("optimizer_state_dict")
        if optimizer is not None:
            content["optimizer_state_dict"] = {**optimizer, "loss_scaler": vars(optimizer["loss_scaler"])}
            for name in ("param_slice_mappings", "param_alignment_paddings", "clip_grad"):
                content["optimizer_state_dict"].pop(name, None)
        elif content["ds_config"]["zero_optimization"]["stage"] < 3:
            content.pop("frozen_param_shapes"), content.pop("frozen_param_fragments")  # they are in the module, too
        content.pop(GROUP_NAMES, None)
        content.pop("mmdistill", None)
    return out


def find_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Path of the first entry that differs, with tensors compared bit by bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"
        return next(filter(None, (find_difference(a[k], b[k], f"{path}/{k}") for k in a)), None)
    if isinstance(a, (list, tuple)) and not isinstance(a, torch.Size):
        if len(a) != len(b):
            return f"{path}: length"
        return next(
            filter(None, (find_difference(x, y, f"{path}/{i}") for i, (x, y) in enumerate(zip(a, b, strict=True)))),
            None,
        )
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return None if same else f"{path}: values"
    return None if a == b else f"{path}: {a!r} / {b!r}"


@pytest.mark.parametrize(
    ("source", "layouts"),
    [
        ("zero1-w2-fp32", [(3, 5)]),
        ("zero2-w2-bf16", [(0, 1), (3, 3)]),
        ("zero3-w2-bf16", [(1, 7)]),
        ("zero3-w2-fp32", [(2, 1), (0, 4), (3, 9)]),
        ("zero1-w1-bf16", [(3, 2)]),
    ],
)
def test_files_sliced_back_are_those_of_deepspeed(source: str, layouts: list[tuple[int, int]], tmp_path: Path) -> None:
    original = here = FIXTURES / source / NAME
    own = read(original).layout
    for index, (stage, world_size) in enumerate([*layouts, (own.stage, own.world_size)]):
        here = convert_layout(here, tmp_path / str(index), stage=stage, world_size=world_size)
        state = read(here)
        assert state.layout == ZeroLayout(stage, world_size)
        for kind in (MASTERS, "exp_avg", "exp_avg_sq"):
            assert find_difference(state.merge(kind), read(original).merge(kind)) is None
    assert find_difference(entries(here), entries(original)) is None


def test_groups_keep_their_parameters_and_weight_decay(tmp_path: Path) -> None:
    state = read(convert_layout(FIXTURES / "zero1-w2-fp32" / NAME, tmp_path / "a", stage=0))
    optimizer = state.optimizers[0]
    assert [group["weight_decay"] for group in optimizer["param_groups"]] == [0.1, 0.0]
    for group, names in zip(optimizer["param_groups"], state.groups, strict=True):
        shapes = [tuple(optimizer["state"][index]["exp_avg"].shape) for index in group["params"]]
        assert shapes == list(names.values())
        assert {len(shape) > 1 for shape in shapes} == {group["weight_decay"] > 0}


def copy_with(source: str, target: Path, edit: Any) -> Path:
    """A copy of a fixture, whose files `edit` has changed in place; stand-ins cannot be written back."""
    for name in sorted(path.name for path in (FIXTURES / source / NAME / "checkpoint").iterdir()):
        content = dict(read_torch_file(FIXTURES / source / NAME / "checkpoint" / name, mapped=False))
        for key in ("loss_scaler", "param_slice_mappings", "zero_stage"):
            content.get("optimizer_state_dict", {}).pop(key, None)
        edit(name, content)
        (target / "checkpoint").mkdir(parents=True, exist_ok=True)
        torch.save(content, target / "checkpoint" / name)
    return target


def test_missing_shard_and_missing_values_are_named(tmp_path: Path) -> None:
    root = Path(shutil.copytree(FIXTURES / "zero2-w2-fp32" / NAME, tmp_path / "shard"))
    (root / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(
        CorruptCheckpointError, match=r"2 ranks but 1 optimizer shard found .*copy the missing ones, of rank 1"
    ):
        read(root)
    root = Path(shutil.copytree(FIXTURES / "zero3-w2-fp32" / NAME, tmp_path / "model"))
    (root / "checkpoint" / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match="2 optimizer shards but 1 model file; copy the missing ones"):
        read(root)

    def cut(name: str, content: dict[str, Any]) -> None:
        for state in content.get("optimizer_state_dict", {}).get("base_optimizer_state", {}).get("state", {}).values():
            state["exp_avg"] = state["exp_avg"][:50]

    with pytest.raises(CorruptCheckpointError, match="the shards contain 100 values of parameter group 0, too few for"):
        read(copy_with("zero1-w2-fp32", tmp_path / "cut", cut)).merge("exp_avg")

    def drop(name: str, content: dict[str, Any]) -> None:
        for state in content.get("optimizer_state_dict", {}).get("base_optimizer_state", {}).get("state", {}).values():
            del state["exp_avg_sq"]

    with pytest.raises(CorruptCheckpointError, match="its optimizer state has no exp_avg_sq; use another checkpoint"):
        read(copy_with("zero1-w2-fp32", tmp_path / "drop", drop))


def test_states_that_cannot_be_sliced_are_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no parameter names, so that ZeRO cannot slice it"):
        read(FIXTURES / "zero0-w2-fp32" / NAME)
    write_deepspeed({"a": torch.ones(2)}, tmp_path / "weights", {"step": 1})
    with pytest.raises(CheckpointError, match="has no optimizer state; use its weights with init_from="):
        read(tmp_path / "weights")
    stage_0 = convert_layout(FIXTURES / "zero1-w2-fp32" / NAME, tmp_path / "stage0", stage=0)
    file = stage_0 / "checkpoint" / "mp_rank_00_model_states.pt"
    content = read_torch_file(file, mapped=False)
    content["optimizer"]["state"][3]["step"] += 1
    torch.save(content, file)
    with pytest.raises(CheckpointError, match="its parameters are at Adam's steps 2, 3, which ZeRO does not support"):
        read(stage_0)
    content["optimizer"]["state"][3] = {**content["optimizer"]["state"][2]}
    torch.save(content, file)
    with pytest.raises(
        CorruptCheckpointError, match=r"the exp_avg of 'encoder.blocks.0.attn.proj.weight' have the shape"
    ):
        read(stage_0).merge("exp_avg")
    del content["optimizer"]["state"][3]
    torch.save(content, file)
    with pytest.raises(CorruptCheckpointError, match=r"do not have the layout of DeepSpeed \('3' is missing\)"):
        read(stage_0).merge("exp_avg")
