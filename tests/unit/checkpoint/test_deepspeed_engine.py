import shutil
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mmdistill.checkpoint import deepspeed_engine
from mmdistill.checkpoint.convert import write_deepspeed
from mmdistill.checkpoint.deepspeed_engine import load_deepspeed, make_loss_scaler, save_deepspeed
from mmdistill.checkpoint.errors import CheckpointError, CorruptCheckpointError, ResumeMismatchError
from mmdistill.checkpoint.formats import manifest
from mmdistill.checkpoint.formats.deepspeed_zero import read_model_states
from mmdistill.checkpoint.formats.torch_zip import read_torch_file
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME


class Engine:
    """The interface of a DeepSpeed engine that the module uses. Real engines: tests/integration."""

    def __init__(self, *, stage: int = 0, world_size: int = 1, bf16: bool = False) -> None:
        self.checkpoint_engine = SimpleNamespace(name="stock")
        self.optimizer = None
        self.global_steps = 4
        self.dp_world_size = world_size
        self.stage, self.bf16 = stage, bf16
        self.loaded: list[tuple[str, str]] = []
        self.parameters = {"a": torch.ones(2)}
        self.module = SimpleNamespace(named_parameters=lambda: self.parameters.items(), named_buffers=dict)

    def zero_optimization_stage(self) -> int:
        return self.stage

    def bfloat16_enabled(self) -> bool:
        return self.bf16

    def fp16_enabled(self) -> bool:
        return False

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert not save_latest
        self.checkpoint_engine.makedirs(f"{folder}/{tag}")
        config = {"zero_optimization": {"stage": self.stage}}
        content = {"module": {"a": torch.ones(2)}, "global_steps": 4, "ds_config": config, **client_state}
        self.checkpoint_engine.save(content, f"{folder}/{tag}/mp_rank_00_model_states.pt")

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, dict[str, Any]]:
        self.loaded.append((folder, tag))
        return folder, self.checkpoint_engine.load(f"{folder}/{tag}/mp_rank_00_model_states.pt")


def test_saved_engine_is_loaded_with_its_client_state(tmp_path: Path) -> None:
    engine = Engine()
    path = save_deepspeed(engine, tmp_path / "a[1]", {"kind": "pretrain", "loss": float("nan")}, {"position": 3})
    assert engine.checkpoint_engine.name == "stock"  # the shim is removed
    assert sorted(p.name for p in path.iterdir()) == ["checkpoint", "latest", "manifest.json", "meta.json"]
    assert load_deepspeed(engine, path) == {"position": 3}
    ((folder, tag),) = engine.loaded
    assert tag == "checkpoint"
    assert "[" not in folder  # DeepSpeed uses it in a glob pattern


@pytest.mark.parametrize(("module", "step"), [(deepspeed_engine, "write_torch"), (manifest, "write_bytes")])
def test_failed_save_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str
) -> None:
    path = save_deepspeed(Engine(), tmp_path / "last", {"kind": "pretrain"}, {"position": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, step, fail)
    with pytest.raises(CheckpointError, match=r"last: not saved: .*No space left on device"):
        save_deepspeed(Engine(), tmp_path / "last", {"kind": "pretrain"}, {"position": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["last"]
    assert load_deepspeed(Engine(), path) == {"position": 1}


def test_metadata_that_is_not_json_serializable_fails_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save_deepspeed(Engine(), tmp_path / "last", {"config": object()}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("engine", "own"),
    [
        (Engine(stage=1, world_size=2, bf16=True), "ZeRO stage 1, 2 processes, precision=bf16"),
        (Engine(stage=3, world_size=1, bf16=True), "ZeRO stage 3, 1 process, precision=bf16"),
    ],
)
def test_another_precision_is_one_error_that_names_both(engine: Engine, own: str) -> None:
    message = f"written with ZeRO stage 1, 2 processes, precision=32, this run has {own}; "
    with pytest.raises(ResumeMismatchError, match=message):
        load_deepspeed(engine, FIXTURES / "zero1-w2-fp32" / NAME)
    assert engine.loaded == []


class ZeroEngine(Engine):
    """An engine of stage 1 with the parameters of a directory, whose slices have `sizes` values."""

    def __init__(self, path: Path, sizes: list[int]) -> None:
        super().__init__(stage=1, world_size=1)
        self.shapes = [dict(group) for group in read_model_states(path / "checkpoint")["param_shapes"]]
        self.optimizer = SimpleNamespace(single_partition_of_fp32_groups=[torch.zeros(size) for size in sizes])

    def _get_zero_param_shapes(self) -> list[dict[str, Any]]:
        return self.shapes

    def load_checkpoint(self, folder: str, *, tag: str) -> tuple[str, dict[str, Any]]:
        (name,) = self._get_all_ckpt_names(folder, tag)
        self.contents = [self.checkpoint_engine.load(n) for n in (name, "zero_pp_rank_0_mp_rank_00_optim_states.pt")]
        return folder, self.contents[0]


@pytest.mark.parametrize("source", ["zero1-w2-fp32", "zero3-w2-fp32"])
def test_engine_of_another_layout_loads_contents_instead_of_files(source: str) -> None:
    path = FIXTURES / source / NAME
    engine = ZeroEngine(path, [1828, 240])
    assert load_deepspeed(engine, path)["epoch"] == 1
    model, shard = engine.contents
    assert (model["dp_world_size"], model["ds_config"]["zero_optimization"]["stage"]) == (1, 1)
    assert [len(group) for group in shard["optimizer_state_dict"]["single_partition_of_fp32_groups"]] == [1828, 240]
    assert not hasattr(engine, "_get_all_ckpt_names")


def test_engine_with_other_parameters_or_slices_loads_nothing() -> None:
    path = FIXTURES / "zero1-w2-fp32" / NAME
    engine = ZeroEngine(path, [1828, 240])
    del engine.shapes[0]["mask_token"]
    with pytest.raises(ResumeMismatchError, match=r"\(checkpoint / run\): mask_token \(1, 1, 4\) / None; use the same"):
        load_deepspeed(engine, path)
    engine.shapes = [{**engine.shapes[0], "mask_token": (1, 1, 4)}, engine.shapes[1]]
    with pytest.raises(ResumeMismatchError, match=r"2 groups / 2 groups, in another order"):
        load_deepspeed(engine, path)
    with pytest.raises(ResumeMismatchError, match=r"slices of \[1830, 240\] values, not \[1828, 240\]"):
        load_deepspeed(ZeroEngine(path, [1830, 240]), path)


@pytest.mark.parametrize(
    "scale", [{"dynamic": False, "cur_scale": 1.0}, {"dynamic": True, "cur_scale": 8.0, "cur_iter": 5, "min_scale": 1,
              "scale_window": 1000, "delayed_shift": 1, "last_overflow_iter": 3}]
)  # fmt: skip
def test_loss_scaler_has_all_stored_attributes(scale: dict[str, Any]) -> None:
    scaler = make_loss_scaler(scale)
    assert scale.items() <= vars(scaler).items()
    assert scaler.loss_scale == scale["cur_scale"]
    assert not getattr(scaler, "raise_error_at_min_scale", False)


def test_stage_0_loads_with_any_number_of_processes() -> None:
    path = FIXTURES / "zero0-w2-fp32" / NAME
    engine = Engine(world_size=8)
    engine.parameters = dict(read_model_states(path / "checkpoint")["module"])
    assert load_deepspeed(engine, path)["epoch"] == 1
    assert len(engine.loaded) == 1
    engine.parameters["mask_token"] = torch.ones(1, 1, 8)
    with pytest.raises(ResumeMismatchError, match=r"run\): mask_token \(1, 1, 4\) / \(1, 1, 8\); use the same model"):
        load_deepspeed(engine, path)
    assert len(engine.loaded) == 1


def test_engine_of_the_same_layout_with_other_parameters_loads_nothing() -> None:
    path = FIXTURES / "zero1-w1-fp32" / NAME
    engine = ZeroEngine(path, [])
    engine.shapes[0]["mask_token"] = (1, 1, 8)
    with pytest.raises(ResumeMismatchError, match=r"run\): mask_token \(1, 1, 4\) / \(1, 1, 8\); use the same model"):
        load_deepspeed(engine, path)


def test_files_of_two_saves_and_other_formats_are_errors(tmp_path: Path) -> None:
    root = Path(shutil.copytree(FIXTURES / "zero1-w1-fp32" / NAME, tmp_path / NAME))
    model = root / "checkpoint" / "mp_rank_00_model_states.pt"
    content = read_torch_file(model, mapped=False)
    torch.save({**content, "global_steps": 5}, model)
    with pytest.raises(CorruptCheckpointError, match="the model file is at step 5, the optimizer shards at step 2"):
        load_deepspeed(Engine(stage=1), root)
    with pytest.raises(CheckpointError, match="a weights file; a DeepSpeed run resumes only from a DeepSpeed dir"):
        load_deepspeed(Engine(), FIXTURES / "plain" / "bare.pt")


def test_damaged_directory_is_not_loaded(tmp_path: Path) -> None:
    write_deepspeed({"a": torch.ones(2)}, tmp_path / "d", {"step": 1})
    (tmp_path / "d" / "latest").write_text("Checkpoint")
    engine = Engine()
    with pytest.raises(CorruptCheckpointError, match="latest"):
        load_deepspeed(engine, tmp_path / "d" / "checkpoint")
    assert engine.loaded == []
