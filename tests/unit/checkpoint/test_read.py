"""Files that other programs wrote are read as exactly the weights that those programs report."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdistill.checkpoint import CheckpointError, CheckpointFormat, detect_format, open_checkpoint, read_checkpoint
from tests.unit.checkpoint.make_fixtures import FIXTURES, NAME

ZERO = [f"zero{stage}-w{world}-{precision}" for stage in range(4) for world in (1, 2) for precision in ("fp32", "bf16")]


def same(state: dict, expected: dict) -> None:
    """Same names, and values equal to the last bit once in fp32."""
    assert sorted(state) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name].float(), tensor.float()), name


@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_directories(name: str) -> None:
    checkpoint = read_checkpoint(FIXTURES / name / NAME)
    same(checkpoint.state_dict, load_file(FIXTURES / name / "expected.safetensors"))
    assert checkpoint.format is CheckpointFormat.DEEPSPEED
    assert (checkpoint.raw.stage, checkpoint.raw.world_size) == (int(name[4]), int(name[7]))
    assert checkpoint.meta["epoch"] == 1
    assert checkpoint.meta["step"] == 2
    trained = [t for n, t in checkpoint.state_dict.items() if not n.startswith("decoder.norm.")]
    assert all(t.dtype is torch.float32 for t in trained)  # the masters, not the bf16 copies


@pytest.mark.parametrize("name", ["zero0-w1-fp32", "zero1-w2-bf16", "zero3-w2-fp32"])
def test_a_path_at_any_level_of_a_directory_is_read(name: str) -> None:
    root = FIXTURES / name / NAME
    expected = load_file(FIXTURES / name / "expected.safetensors")
    inner = sorted((root / "checkpoint").iterdir())
    for path in (root, root / "checkpoint", root / "latest", *inner):
        assert detect_format(path) is CheckpointFormat.DEEPSPEED
        same(read_checkpoint(path).state_dict, expected)


def test_folder_of_checkpoints_is_an_error_that_lists_them() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"contains \d+ checkpoints; give one of these, newest first:\n(  /.*\n){12}  \.\.\. and \d+ more$",
    ):
        read_checkpoint(FIXTURES)


@pytest.mark.parametrize("kind", ["lightning", "lightning-deepspeed"])
def test_lightning_file_and_deepspeed_directory(kind: str) -> None:
    path = FIXTURES / kind / "epoch=00-train_loss=0.5000.ckpt"
    checkpoint = read_checkpoint(path)
    same(checkpoint.state_dict, load_file(FIXTURES / kind / "expected.safetensors"))
    assert checkpoint.format is (CheckpointFormat.LIGHTNING if kind == "lightning" else CheckpointFormat.DEEPSPEED)
    assert checkpoint.meta["kind"] == "distill"
    assert checkpoint.components == ["student_rgb", "teacher_rgb"]
    assert checkpoint.meta["step"] == 2


@pytest.mark.parametrize("name", ["bare.pt", "model.pth", "module.pt", "state_dict.pt", "legacy.pth"])
def test_torch_files_of_every_layout(name: str) -> None:
    checkpoint = read_checkpoint(FIXTURES / "plain" / name)
    same(checkpoint.state_dict, load_file(FIXTURES / "plain" / "expected.safetensors"))
    assert checkpoint.format is CheckpointFormat.WEIGHTS


@pytest.mark.parametrize("folder", ["hf-model", "hf-pretraining"])
def test_huggingface_folders(folder: str) -> None:
    raw = load_file(FIXTURES / folder / "model.safetensors")
    state = read_checkpoint(FIXTURES / folder).state_dict
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in raw.values())
    base = "videomae." if folder == "hf-pretraining" else ""
    layer = f"{base}encoder.layer.0.attention.attention."
    qkv = torch.cat([raw[f"{layer}{n}.weight"] for n in ("query", "key", "value")])
    assert torch.equal(state["encoder.blocks.0.attn.qkv.weight"], qkv)
    assert torch.equal(state["encoder.blocks.0.attn.v_bias"], raw[f"{layer}v_bias"])
    assert torch.equal(state["encoder.norm.weight"], raw[f"{base}layernorm.weight"])
    assert ("decoder.blocks.0.mlp.fc2.bias" in state) == (folder == "hf-pretraining")


def test_copied_model_file_is_read_with_a_note(tmp_path: Path) -> None:
    """It is complete at stages 0 to 2; with bf16 a note says that the weights are rounded."""
    source = FIXTURES / "zero1-w2-bf16" / NAME / "checkpoint" / "mp_rank_00_model_states.pt"
    alone = tmp_path / source.name
    alone.write_bytes(source.read_bytes())
    checkpoint = read_checkpoint(alone)
    assert any("the low-precision weights are read" in note for note in checkpoint.raw.notes)
    renamed = tmp_path / "rgb.pt"
    renamed.write_bytes(source.read_bytes())
    assert sorted(read_checkpoint(renamed).state_dict) == sorted(checkpoint.state_dict)
    sharded = FIXTURES / "zero3-w1-fp32" / NAME / "checkpoint" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / sharded.name).write_bytes(sharded.read_bytes())
    with pytest.raises(CheckpointError, match="stage 3 stores the weights in"):
        read_checkpoint(tmp_path / "b")


@pytest.mark.parametrize("name", ["plain/state_dict.pt", "zero1-w1-fp32", "zero1-w2-bf16"])
def test_each_file_is_unpickled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FIXTURES / name if "/" in name else FIXTURES / name / NAME
    loaded: list[Path] = []
    real = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **options: loaded.append(file) or real(file, **options))
    checkpoint = open_checkpoint(path)
    encoder = checkpoint.encoder(num_frames=2, height=8, width=8, heads=2)
    assert checkpoint.components == ["encoder"]
    assert checkpoint.meta["kind"] == "pretrain"
    assert torch.equal(encoder.norm.weight, checkpoint.state_dict["encoder.norm.weight"])
    assert len(loaded) == len(set(loaded)) == {"plain/state_dict.pt": 1, "zero1-w1-fp32": 1, "zero1-w2-bf16": 3}[name]


def test_content_of_a_pickled_file_decides_before_its_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2)}, "pytorch-lightning_version": "2"}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    assert checkpoint.format is CheckpointFormat.LIGHTNING
    assert torch.equal(checkpoint.state_dict["a"], torch.ones(2))
    assert "tensor" not in repr(checkpoint)
    assert checkpoint.stored_meta == {}
