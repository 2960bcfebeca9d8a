from dataclasses import asdict, replace

import pytest
import torch

from mmdistill.checkpoint.architecture import (
    decoder_config_from_tensors,
    encoder_config_from_meta,
    encoder_config_from_tensors,
    infer_token_grid,
    is_sincos,
    resize_positions,
)
from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.models.videomae import DecoderConfig, Encoder, EncoderConfig, VideoMAE, sincos_positions

CONFIG = EncoderConfig(3, 4, 8, 12, 4, 2, 16, 2, 3, 5, 32)  # like the user's width 1024 with 12 heads of 85


def test_config_from_metadata() -> None:
    assert encoder_config_from_meta({**asdict(CONFIG), "added_later": 1}) == CONFIG
    fields = {k: v for k, v in asdict(CONFIG).items() if k != "pos_embed"}  # as version 0.1 wrote them
    for old, pos_embed in (
        ({}, "sincos"),
        ({"separable_positions": True}, "sincos_separable"),
        ({"learned_positions": True}, "learned"),
    ):
        assert encoder_config_from_meta({**fields, **old}).pos_embed == pos_embed
    with pytest.raises(CheckpointError, match="encoder config in the metadata is incomplete"):
        encoder_config_from_meta({"dim": 16})


def test_config_from_tensors() -> None:
    state = Encoder(CONFIG).state_dict()
    found, notes = encoder_config_from_tensors(state, num_frames=4, height=8, width=12)
    assert found == CONFIG
    assert notes == ["3 heads of 5 inferred from the attention width 15"]
    assumed, notes = encoder_config_from_tensors(state)
    assert assumed == replace(CONFIG, num_frames=16, height=56, width=56)
    assert any("the default of VideoMAE is used: 16 frames of 14 x 14 patches" in note for note in notes)


@pytest.mark.parametrize(("dim", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_config_of_the_releases(dim: int, heads: int) -> None:
    with torch.device("meta"):
        state = Encoder(EncoderConfig(3, 16, 224, 224, 16, 2, dim, 2, heads, dim // heads, 4 * dim)).state_dict()
    found, _ = encoder_config_from_tensors(state)
    assert (found.heads, found.depth, found.grid) == (heads, 2, (8, 14, 14))


def test_number_of_heads_that_tensors_do_not_determine() -> None:
    state = Encoder(replace(CONFIG, dim=20, heads=2, head_dim=10)).state_dict()
    with pytest.raises(CheckpointError, match=r"width 20 and attention width 20; .* --heads=N \(Python: "):
        encoder_config_from_tensors(state)
    assert encoder_config_from_tensors(state, heads=2)[0].heads == 2
    with pytest.raises(CheckpointError, match="the attention width 20 is not a multiple of heads=3"):
        encoder_config_from_tensors(state, heads=3)


def test_tensors_of_something_else_are_errors() -> None:
    with pytest.raises(CheckpointError, match=r"not an encoder: the tensor 'patch_embed\.proj\.weight' is missing"):
        encoder_config_from_tensors({"a": torch.zeros(1)})
    state = Encoder(CONFIG).state_dict() | {"patch_embed.proj.weight": torch.zeros(16, 3, 4, 4)}
    with pytest.raises(CheckpointError, match="expected \\[D, C, t, p, p\\] as in VideoMAE"):
        encoder_config_from_tensors(state)


def test_decoder_config() -> None:
    decoder = DecoderConfig(64, 2, 1, 64, 8)
    assert decoder_config_from_tensors(VideoMAE(CONFIG, decoder).state_dict()) == decoder
    assert decoder_config_from_tensors(Encoder(CONFIG).state_dict()) is None


@pytest.mark.parametrize(
    ("tokens", "frames", "grid"),
    [(1568, 8, (8, 14, 14)), (2688, 8, (8, 14, 24)), (12, 2, (2, 2, 3)), (196, 8, (4, 7, 7)), (7, 2, (1, 1, 7))],
)
def test_token_grid(tokens: int, frames: int, grid: tuple[int, int, int]) -> None:
    assert infer_token_grid(tokens, frames) == grid


def test_sincos_table_is_recognized() -> None:
    table = sincos_positions(12, 16)[None]
    assert is_sincos(table)
    assert is_sincos(table + 1e-6)
    assert not is_sincos(table + 1e-3)
    assert not is_sincos(torch.randn(1, 12, 16))


def test_resized_positions_keep_a_linear_ramp() -> None:
    ramp = torch.linspace(0, 1, 5)[None, :, None].expand(1, 5, 3)
    wider = resize_positions(ramp, (1, 1, 5), (1, 1, 10))
    assert wider.shape == (1, 10, 3)
    expected = ((torch.arange(10) + 0.5) / 2 - 0.5).clamp(0, 4) / 4
    torch.testing.assert_close(wider[0, :, 0], expected)
    assert torch.equal(resize_positions(ramp, (1, 1, 5), (1, 1, 5)), ramp)
