from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmdistill.checkpoint import (
    CheckpointError,
    WeightMismatchError,
    load_encoder,
    load_encoder_for_clips,
    load_weights,
    read_checkpoint,
    save_safetensors,
    save_torch,
)
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = EncoderConfig(3, 2, 8, 8, 4, 2, 8, 1, 2, 4, 16)
DECODER = DecoderConfig(4, 1, 1, 4, 8)


def encoder_meta(**components: Encoder) -> dict:
    return {"encoders": {name: vars(encoder.config) for name, encoder in components.items()}}


def copy_state_of(module: torch.nn.Module) -> dict:
    return {k: v.clone() for k, v in module.state_dict().items()}


def is_unchanged(module: torch.nn.Module, before: dict) -> bool:
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_load_of_a_model_and_of_its_encoder() -> None:
    net = VideoMAE(CONFIG, DECODER)
    report = load_weights(net, FIXTURES / "plain" / "bare.pt")
    assert report.tensors == len(net.state_dict())
    assert report.parameters == sum(p.numel() for p in net.parameters())
    encoder = Encoder(CONFIG)
    report = load_weights(encoder, FIXTURES / "plain" / "bare.pt")
    assert report.ignored_keys == {"decoder": 17, "encoder_to_decoder": 1, "mask_token": 1}
    assert all(torch.equal(v, net.encoder.state_dict()[k]) for k, v in encoder.state_dict().items())


def test_mismatches_are_listed_and_the_module_is_unchanged(tmp_path: Path) -> None:
    state = VideoMAE(CONFIG, DECODER).state_dict()
    state["encoder.extra"] = torch.zeros(1)
    state["encoder.norm.bias"] = torch.zeros(5)
    del state["mask_token"]
    save_torch(state, tmp_path / "odd.pt")
    net = VideoMAE(CONFIG, DECODER)
    before = copy_state_of(net)
    with pytest.raises(WeightMismatchError) as caught:
        load_weights(net, tmp_path / "odd.pt")
    text = str(caught.value)
    assert "odd.pt" in text
    assert "1 missing: mask_token" in text
    assert "1 unexpected: encoder.extra" in text
    assert "encoder.norm.bias [5] in the file, [8] in the module" in text
    assert is_unchanged(net, before)


def test_no_match_is_an_error_even_with_allow_missing(tmp_path: Path) -> None:
    save_torch({"other.weight": torch.zeros(3)}, tmp_path / "other.pt")
    net = VideoMAE(CONFIG, DECODER)
    with pytest.raises(WeightMismatchError, match="no tensor matches"):
        load_weights(net, tmp_path / "other.pt", allow_missing=["*"])
    with pytest.raises(CheckpointError, match=r"contains no encoder.*other \(1\)"):
        load_weights(net.encoder, tmp_path / "other.pt", allow_missing=["*"])


def test_allow_missing_is_reported(tmp_path: Path) -> None:
    state = VideoMAE(CONFIG, DECODER).state_dict()
    save_torch({k: v for k, v in state.items() if not k.startswith("decoder.norm")}, tmp_path / "part.pt")
    net = VideoMAE(CONFIG, DECODER)
    report = load_weights(net, tmp_path / "part.pt", allow_missing=["decoder.norm.*"])
    assert report.missing == ("decoder.norm.weight", "decoder.norm.bias")
    assert report.tensors == len(state) - 2


def test_dtype_conversion_is_reported(tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in Encoder(CONFIG).state_dict().items()}
    save_torch({"model": state}, tmp_path / "half.pt")
    report = load_weights(Encoder(CONFIG), tmp_path / "half.pt")
    assert report.conversions == {"bfloat16 -> float32": len(state)}
    assert "converted bfloat16 -> float32" in str(report)


def test_components_of_a_distilled_file(tmp_path: Path) -> None:
    student, teacher = Encoder(CONFIG), Encoder(replace(CONFIG, channels=17, depth=2))
    state = {f"student_rgb.encoder.{k}": v for k, v in student.state_dict().items()}
    state |= {f"teacher_skeleton.encoder.{k}": v for k, v in teacher.state_dict().items()}
    content = {"state_dict": state, "pytorch-lightning_version": "2", "epoch": 3, "global_step": 9}
    content["mmdistill"] = {"kind": "distill", **encoder_meta(student_rgb=student, teacher_skeleton=teacher)}
    save_torch(content, tmp_path / "last.ckpt")
    loaded = load_encoder(tmp_path / "last.ckpt")
    assert loaded.config == student.config
    assert torch.equal(loaded.norm.weight, student.norm.weight)
    assert load_encoder(tmp_path / "last.ckpt", part="teacher_skeleton").config == teacher.config
    with pytest.raises(
        CheckpointError, match="no component 'teacher_flow'; select one of student_rgb, teacher_skeleton"
    ):
        load_encoder(tmp_path / "last.ckpt", part="teacher_flow")


def test_encoder_with_free_head_width_and_classifiers() -> None:
    path = FIXTURES / "plain" / "free_width_sincos.pth"
    encoder = load_encoder(path, num_frames=4, height=8, width=12)
    config = encoder.config
    found = (config.dim, config.heads, config.head_dim, config.depth, config.mlp_dim, config.pos_embed)
    assert found == (16, 3, 5, 2, 32, "sincos")
    report = load_weights(encoder, path)
    assert report.ignored_keys == {"head_action": 2, "head_verb": 2, "head_noun": 2}
    encoder(torch.zeros(1, 3, 4, 8, 12))
    learned = load_encoder(FIXTURES / "plain" / "free_width_learned.pth", num_frames=4, height=8, width=12)
    assert learned.config.pos_embed == "learned"
    assert learned.pos_embed.shape == (1, 12, 16)


def test_encoder_with_12_heads_of_85(tmp_path: Path) -> None:
    """Width 1024, 12 heads of 85: qkv [3060, 1024], proj [1024, 1020]."""
    source = Encoder(EncoderConfig(3, 16, 224, 384, 16, 2, 1024, 1, 12, 85, 64))
    state = source.state_dict()
    assert state["blocks.0.attn.qkv.weight"].shape == (3060, 1024)
    save_torch({"state_dict": state | {"head_action.weight": torch.zeros(5, 1024)}}, tmp_path / "own.pth")
    encoder = load_encoder(tmp_path / "own.pth", height=224, width=384)
    assert encoder.config == source.config
    assert torch.equal(encoder.blocks[0].attn.proj.weight, source.blocks[0].attn.proj.weight)


def test_sincos_positions_are_recomputed(tmp_path: Path) -> None:
    source = Encoder(CONFIG)
    save_torch({**source.state_dict(), "pos_embed": source.pos_embed}, tmp_path / "table.pt")
    longer = Encoder(replace(CONFIG, num_frames=8))
    report = load_weights(longer, tmp_path / "table.pt")
    assert any("recomputed" in note for note in report.notes)
    assert torch.equal(longer.pos_embed, Encoder(longer.config).pos_embed)
    learned = Encoder(replace(CONFIG, num_frames=8, pos_embed="learned"))
    with torch.no_grad():
        learned.pos_embed.zero_()
    load_weights(learned, tmp_path / "table.pt")
    assert torch.equal(learned.pos_embed, longer.pos_embed)


def test_learned_positions_are_interpolated(tmp_path: Path) -> None:
    source = Encoder(replace(CONFIG, pos_embed="learned"))
    with torch.no_grad():
        source.pos_embed.copy_(torch.arange(4.0)[None, :, None].expand(1, 4, 8))  # 2 x 2, constant over width
    save_safetensors(
        {f"encoder.{k}": v for k, v in source.state_dict().items()},
        tmp_path / "e.safetensors",
        encoder_meta(encoder=source),
    )
    encoder = load_encoder(tmp_path / "e.safetensors", num_frames=4)
    report = load_weights(encoder, tmp_path / "e.safetensors")
    assert encoder.pos_embed.shape == (1, 8, 8)
    assert torch.equal(encoder.pos_embed[0, :4], source.pos_embed[0])  # repeated along time
    assert any("interpolated from (1, 2, 2) to (2, 2, 2)" in note for note in report.notes)


def test_learned_positions_in_a_sincos_encoder_are_an_error(tmp_path: Path) -> None:
    save_torch({**Encoder(CONFIG).state_dict(), "pos_embed": torch.randn(1, 4, 8)}, tmp_path / "learned.pt")
    with pytest.raises(WeightMismatchError, match="1 unexpected: pos_embed"):
        load_weights(Encoder(CONFIG), tmp_path / "learned.pt")


def test_other_number_of_heads_with_equal_shapes_raises(tmp_path: Path) -> None:
    source = Encoder(CONFIG)
    save_safetensors(
        {f"encoder.{k}": v for k, v in source.state_dict().items()},
        tmp_path / "e.safetensors",
        encoder_meta(encoder=source),
    )
    other = Encoder(replace(CONFIG, heads=1, head_dim=8))
    before = copy_state_of(other)
    with pytest.raises(WeightMismatchError, match=r"\(checkpoint / module\): heads 2 / 1, head_dim 4 / 8"):
        load_weights(other, tmp_path / "e.safetensors")
    assert is_unchanged(other, before)


@pytest.mark.parametrize("has_metadata", [True, False])
def test_input_size_of_clips(tmp_path: Path, has_metadata: bool) -> None:
    """Without metadata the token grid of the data and the patch of the weights give it; metadata are kept."""
    source = Encoder(replace(CONFIG, dim=384, heads=6, head_dim=64))
    state = {f"encoder.{k}": v for k, v in source.state_dict().items()}
    save_torch({"model": state, "mmdistill": encoder_meta(encoder=source) if has_metadata else {}}, tmp_path / "e.pt")
    encoder = load_encoder_for_clips(read_checkpoint(tmp_path / "e.pt"), num_frames=6, token_grid=(3, 5))
    size = (encoder.config.num_frames, encoder.config.height, encoder.config.width)
    assert size == ((2, 8, 8) if has_metadata else (6, 12, 20))
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
