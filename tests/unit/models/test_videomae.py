"""The encoder and the masked autoencoder against transformers' VideoMAE and against formulas."""

import math

import numpy as np
import pytest
import torch
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from mmdistill.models.targets import patch_targets, reconstruction_loss
from mmdistill.models.videomae import (
    Attention,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    VideoMAE,
    gather_patches,
    masked_indices,
    separable_positions,
    sincos_positions,
)

ENCODER = EncoderConfig(
    channels=3,
    num_frames=4,
    height=32,
    width=32,
    patch=16,
    tubelet=2,
    dim=48,
    depth=2,
    heads=4,
    head_dim=12,
    mlp_dim=96,
)
DECODER = DecoderConfig(dim=24, depth=2, heads=2, head_dim=12, mlp_dim=48)


def _pair() -> tuple[VideoMAE, VideoMAEForPreTraining]:
    """Our model and transformers' with the same random weights."""
    torch.manual_seed(0)
    theirs = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=32,
            patch_size=16,
            num_frames=4,
            tubelet_size=2,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=48,
            layer_norm_eps=1e-6,
            norm_pix_loss=True,
            use_mean_pooling=False,  # only then is there the encoder.norm of VideoMAE's pretraining
        )
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in (
            ("videomae.embeddings.patch_embeddings.projection", "encoder.patch_embed.proj"),
            ("videomae.encoder.layer", "encoder.blocks"),
            ("videomae.layernorm", "encoder.norm"),
            ("decoder.decoder_layers", "decoder.blocks"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("attention.attention.", "attn."),
            ("query.bias", "q_bias"),
            ("value.bias", "v_bias"),
        ):
            name = name.replace(old, new)
        state[name] = tensor
    merged = {}
    for name, tensor in state.items():
        if name.endswith("attn.query.weight"):
            stem = name.removesuffix("query.weight")
            merged[f"{stem}qkv.weight"] = torch.cat([state[f"{stem}{p}.weight"] for p in ("query", "key", "value")])
        elif not name.endswith(("attn.key.weight", "attn.value.weight")):
            merged[name] = tensor
    ours = VideoMAE(ENCODER, DECODER).eval()
    expected = ours.state_dict()
    assert set(expected) <= set(merged), set(expected) - set(merged)
    ours.load_state_dict({name: merged[name] for name in expected})
    return ours, theirs


def test_encoder_and_loss_equal_transformers() -> None:
    ours, theirs = _pair()
    clip = torch.rand(2, 3, 4, 32, 32)
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1, 1)
    x = (clip - mean) / std
    visible = torch.tensor([[0, 3, 5], [1, 2, 7]])
    removed = torch.ones(2, 8, dtype=torch.bool).scatter_(1, visible, False)  # transformers: True is removed
    with torch.no_grad():
        reference = theirs(x.transpose(1, 2), bool_masked_pos=removed)
        features = theirs.videomae(x.transpose(1, 2), bool_masked_pos=removed).last_hidden_state
        prediction, predict = ours(x, visible)
        target = patch_targets(x, predict, ENCODER.grid, target="norm_pix")
        loss = reconstruction_loss(prediction, target)
        tokens = ours.encoder(x, visible)
    torch.testing.assert_close(tokens, features, atol=1e-5, rtol=1e-5)
    channels_last = prediction.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)  # VideoMAE's order
    torch.testing.assert_close(channels_last, reference.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, reference.loss, atol=1e-5, rtol=1e-5)


def test_clip_without_mask_equals_all_tokens_visible() -> None:
    encoder = Encoder(ENCODER).eval()
    x = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(encoder(x), encoder(x, torch.arange(8).expand(2, -1)), atol=0, rtol=0)


def test_only_visible_patches_matter() -> None:
    encoder = Encoder(ENCODER).eval()
    x = torch.randn(1, 3, 4, 32, 32)
    visible = torch.tensor([[0, 6]])  # frames 0-1 top left, frames 2-3 bottom left
    changed = x.clone()
    changed[:, :, :, :, 16:] = 99.0
    changed[:, :, :2, 16:] = 99.0
    assert torch.equal(encoder(x, visible), encoder(changed, visible))
    changed[:, :, 0, 0, 0] = 5.0
    assert not torch.equal(encoder(x, visible), encoder(changed, visible))


def test_feature_is_layer_norm_of_the_mean() -> None:
    encoder = Encoder(ENCODER).eval()
    x, visible = torch.randn(2, 3, 4, 32, 32), torch.tensor([[0, 3, 5], [1, 2, 7]])
    mean = encoder(x, visible).detach().double().mean(dim=1)
    centered = mean - mean.mean(dim=1, keepdim=True)
    expected = centered / (centered.pow(2).mean(dim=1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(encoder.embed(x, visible).detach().double(), expected, atol=1e-5, rtol=1e-5)


def test_patch_embedding_is_the_conv3d() -> None:
    encoder = Encoder(ENCODER)
    x = torch.randn(2, 3, 4, 32, 32)
    reference = encoder.patch_embed.proj(x).flatten(2).transpose(1, 2)
    index = torch.arange(8).expand(2, -1)
    torch.testing.assert_close(
        encoder.patch_embed(gather_patches(x, index, ENCODER.grid)), reference, atol=1e-5, rtol=1e-5
    )


def test_positions_against_scalar_formula() -> None:
    table = sincos_positions(9, 10)
    for position in range(9):
        for column in range(10):
            angle = position / 10000 ** (2 * (column // 2) / 10)
            assert table[position, column].item() == pytest.approx(
                math.cos(angle) if column % 2 else math.sin(angle), abs=1e-6
            )


def test_patches_of_several_clips_that_are_not_contiguous() -> None:
    x = torch.randn(2, 4, 3, 6, 8).transpose(1, 2)  # (B, C, T, H, W), not contiguous
    index = torch.tensor([[7, 0], [3, 11]])
    found = gather_patches(x, index, (2, 3, 2))
    for b, n in np.ndindex(2, 2):
        t, h, w = np.unravel_index(index[b, n].item(), (2, 3, 2))
        assert torch.equal(found[b, n], x[b, :, 2 * t : 2 * t + 2, 2 * h : 2 * h + 2, 4 * w : 4 * w + 4])


def test_dual_masking_predicts_the_given_tokens() -> None:
    model = VideoMAE(ENCODER, DECODER).eval()
    x, visible = torch.randn(1, 3, 4, 32, 32), torch.tensor([[0, 5]])
    subset = torch.tensor([[2, 7]])
    prediction, predict = model(x, visible, subset)
    assert prediction.shape == (1, 2, ENCODER.patch_dim)
    assert torch.equal(predict, subset)
    prediction, order = model(x, visible)
    assert prediction.shape == (1, 6, ENCODER.patch_dim)
    assert torch.equal(order, masked_indices(visible, 8))


def test_width_that_heads_do_not_divide() -> None:
    config = EncoderConfig(3, 4, 32, 32, 16, 2, dim=64, depth=2, heads=5, head_dim=12, mlp_dim=96)
    encoder = Encoder(config)
    assert encoder.state_dict()["blocks.0.attn.qkv.weight"].shape == (180, 64)
    assert encoder.state_dict()["blocks.0.attn.proj.weight"].shape == (64, 60)
    block, x = encoder.blocks[0], torch.randn(1, 3, 64)
    q, k, v = (block.attn.qkv(x)).view(1, 3, 3, 5, 12).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(12), dim=-1)
    expected = block.attn.proj((weights @ v).transpose(1, 2).reshape(1, 3, 60))
    torch.testing.assert_close(block.attn(x), expected, atol=1e-6, rtol=1e-5)


def test_activation_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    encoder, x = Encoder(ENCODER).train(), torch.randn(2, 3, 4, 32, 32)
    encoder.embed(x).pow(3).sum().backward()
    before = {n: p.grad.clone() for n, p in encoder.named_parameters()}
    encoder.zero_grad()
    encoder.set_activation_checkpointing(True)
    encoder.embed(x).pow(3).sum().backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, before[name], atol=1e-6, rtol=1e-5)


def test_error_names_the_wrong_clip_size() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4, 32, 32\), got \(3, 4, 16, 32\)"):
        Encoder(ENCODER)(torch.zeros(1, 3, 4, 16, 32))
    with pytest.raises(ValueError, match="width=30"):
        EncoderConfig(3, 4, 32, 30, 16, 2, 48, 2, 4, 12, 96)


def test_every_dtype_runs() -> None:
    """DeepSpeed casts parameters to bf16, but no buffers."""
    model = VideoMAE(ENCODER, DECODER)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    prediction, _ = model(torch.randn(1, 3, 4, 32, 32).bfloat16(), torch.tensor([[0, 5]]))
    assert prediction.dtype == torch.bfloat16


def test_separable_positions_against_scalar_formula() -> None:
    """A quarter of the columns encodes t, three eighths each encode h and w."""
    grid, dim = (2, 3, 4), 32
    table = separable_positions(grid, dim).view(*grid, dim)
    for t, h, w in np.ndindex(*grid):
        expected = [math.cos(p / 10000 ** (2 * (c // 2) / n)) if c % 2 else math.sin(p / 10000 ** (2 * (c // 2) / n))
                    for p, n in ((t, 8), (h, 12), (w, 12)) for c in range(n)]  # fmt: skip
        np.testing.assert_allclose(table[t, h, w].numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        separable_positions(grid, 24)


def test_attention_equals_its_formula_for_a_head_width_that_differs_from_width_over_heads() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 2, qkv_bias=True, attn_head_dim=5).double()
    for bias in (layer.q_bias, layer.v_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = ((x @ w.T).view(2, 7, 2, 5) for w in layer.qkv.weight.chunk(3))
    q, v = q + layer.q_bias.view(2, 5), v + layer.v_bias.view(2, 5)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 5**0.5).softmax(-1)
    expected = layer.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-10)
