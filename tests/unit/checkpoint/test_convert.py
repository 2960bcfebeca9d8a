import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdistill.checkpoint import CheckpointError, read_checkpoint, save_safetensors, save_torch
from mmdistill.checkpoint.convert import convert_checkpoint, convert_layout
from mmdistill.checkpoint.formats.manifest import verify_manifest
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, VideoMAE

FIXTURES = Path(__file__).parent / "fixtures"
TARGETS = ["a.safetensors", "a.ckpt", "a.pt", "epoch=03-loss=0.2500"]


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_identical(one: Path, other: Path) -> None:
    a, b = read_checkpoint(one), read_checkpoint(other)
    assert sorted(a.state_dict) == sorted(b.state_dict)
    for name, tensor in a.state_dict.items():
        assert tensor.dtype == b.state_dict[name].dtype
        assert torch.equal(bytes_of(tensor), bytes_of(b.state_dict[name]))


@pytest.mark.parametrize("source", ["zero3-w2-bf16", "zero0-w1-fp32", "lightning"])
def test_round_trips_keep_every_bit(source: str, tmp_path: Path) -> None:
    start = next(p for p in (FIXTURES / source).iterdir() if p.name.startswith("epoch"))
    here = start
    for index, target in enumerate([*TARGETS, *reversed(TARGETS)]):
        here = convert_checkpoint(here, tmp_path / str(index) / target)
        assert_identical(start, here)
    assert read_checkpoint(here).meta["epoch"] == read_checkpoint(start).meta["epoch"]


def test_tensors_larger_than_a_write_piece_are_complete(tmp_path: Path) -> None:
    """Larger than the pieces in which files are written, and not a multiple of them."""
    state = {"a": torch.randn(5_000_003), "b": torch.randn(7_000_001).half(), "c": torch.tensor(3)}
    save_torch(state, tmp_path / "w.pt")
    torch.save(state, tmp_path / "theirs.pt")
    save_safetensors(state, tmp_path / "w.safetensors", {})
    for read in (torch.load(tmp_path / "w.pt"), load_file(tmp_path / "w.safetensors")):
        assert all(torch.equal(read[name], tensor) for name, tensor in state.items())
    for name in ("w.pt", "w.safetensors"):
        assert_identical(tmp_path / "theirs.pt", tmp_path / name)


def test_existing_targets_are_replaced_only_with_force(tmp_path: Path) -> None:
    source = FIXTURES / "plain" / "bare.pt"
    for target in TARGETS:
        convert_checkpoint(source, tmp_path / target)
        with pytest.raises(CheckpointError, match=r"exists; choose another name, or use --force"):
            convert_checkpoint(source, tmp_path / target)
        convert_checkpoint(source, tmp_path / target, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(TARGETS)


def test_unknown_suffix_lists_the_formats(tmp_path: Path) -> None:
    for name in ("x.foo", "x.bin", "x.SAFETENSORS"):
        with pytest.raises(CheckpointError, match=r"unknown suffix \.\w+; use \.safetensors, \.ckpt \(Lightning\)"):
            convert_checkpoint(FIXTURES / "plain" / "bare.pt", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_layout_of_a_training_state(tmp_path: Path) -> None:
    source = FIXTURES / "zero1-w2-fp32" / "epoch=01-loss=0.5000"
    target = convert_layout(source, tmp_path / "epoch=01-loss=0.5000", stage=3)
    assert_identical(source, target)
    assert sorted(path.name for path in (target / "checkpoint").iterdir()) == [
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt" for rank in range(2) for kind in ("model", "optim")
    ]
    manifest = verify_manifest(target, full=True) or {}
    assert [manifest[key] for key in ("stage", "world_size", "step", "epoch")] == [3, 2, 2, 1]
    other = convert_layout(target, tmp_path / "other", world_size=3)  # the stage of the source
    assert [(verify_manifest(other) or {})[key] for key in ("stage", "world_size")] == [3, 3]


def test_layouts_that_do_not_exist_are_errors(tmp_path: Path) -> None:
    source, target = FIXTURES / "zero1-w2-fp32" / "epoch=01-loss=0.5000", tmp_path / "t"
    with pytest.raises(CheckpointError, match="ZeRO world size 0: use a stage of 0 to 3 and"):
        convert_layout(source, target, world_size=0)
    with pytest.raises(CheckpointError, match=r"is a DeepSpeed directory; use a name without \.pt"):
        convert_layout(source, tmp_path / "x.pt", stage=1)
    with pytest.raises(CheckpointError, match="a weights file; only a DeepSpeed directory has a ZeRO stage"):
        convert_layout(FIXTURES / "plain" / "bare.pt", target, stage=1)
    assert not list(tmp_path.iterdir())
    target.mkdir()
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        convert_layout(source, target, stage=1)
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    (damaged / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="of rank 1"):
        convert_layout(damaged, target, stage=1, force=True)
    assert list(target.iterdir()) == []


def test_paths_with_special_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a=b, [1] *? ~x é 检查点"
    folder.mkdir()
    for target in TARGETS:
        here = convert_checkpoint(FIXTURES / "zero1-w2-bf16" / "epoch=01-loss=0.5000", folder / target)
        assert_identical(here, FIXTURES / "zero1-w2-bf16" / "epoch=01-loss=0.5000")
    monkeypatch.setenv("HOME", str(folder))
    assert read_checkpoint("~/a.ckpt").path == Path("~/a.ckpt")
    convert_checkpoint("~/a.ckpt", "~/b.safetensors")
    assert (folder / "b.safetensors").exists()


def test_lightning_file_from_weights_loads_in_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning")
    path = convert_checkpoint(FIXTURES / "plain" / "bare.pt", tmp_path / "x.ckpt")

    class Holder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            net = VideoMAE(EncoderConfig(3, 2, 8, 8, 4, 2, 8, 1, 2, 4, 16), DecoderConfig(4, 1, 1, 4, 8))
            self.mask_token = net.mask_token
            for name, child in net.named_children():
                setattr(self, name, child)

    loaded = Holder.load_from_checkpoint(path, weights_only=True).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in read_checkpoint(path).state_dict.items())
