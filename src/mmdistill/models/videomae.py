"""VideoMAE (Tong et al., NeurIPS 2022, arXiv 2203.12602): encoder, decoder, masked autoencoder.

Parameter names are those of VideoMAE, so its checkpoints and those of Hugging Face can be loaded. Only visible patches
are embedded and encoded. Blocks are timm's `Block` of BEiT, which has the same parameter names.

Shapes: B batch, C channels, T frames, H x W pixels, L tokens (t major, then h, then w), Lv visible tokens, Lp
predicted tokens, D encoder width, Dd decoder width, P = tubelet * patch * patch * C values of one token.
"""

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm
from timm.models.beit import Attention as TimmAttention
from timm.models.beit import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdistill.models.attention import attention
from mmdistill.models.pooling import Pooling

_MEAN = Pooling()


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that determines an encoder's tensors. Sizes are of the model input (heat-maps: 56 x 96, patch 4).

    `final_norm` is False for VideoMAEs that were fine-tuned with mean pooling: they have no norm after the last block.
    """

    channels: int
    num_frames: int
    height: int
    width: int
    patch: int
    tubelet: int
    dim: int
    depth: int
    heads: int
    head_dim: int
    mlp_dim: int
    pos_embed: str = "sincos"
    final_norm: bool = True
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name, size, unit in (
            ("num_frames", self.num_frames, self.tubelet),
            ("height", self.height, self.patch),
            ("width", self.width, self.patch),
        ):
            if unit < 1 or size < unit or size % unit:
                raise ValueError(f"{name}={size} must be a positive multiple of {unit} (the tubelet or patch size)")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens along time, height and width."""
        return self.num_frames // self.tubelet, self.height // self.patch, self.width // self.patch

    @property
    def num_tokens(self) -> int:
        """L, the number of tokens of a clip."""
        t, h, w = self.grid
        return t * h * w

    @property
    def patch_dim(self) -> int:
        """P, the number of input values in one token."""
        return self.channels * self.tubelet * self.patch * self.patch


@dataclass(frozen=True)
class DecoderConfig:
    """Width and depth of the decoder, which is used in pretraining only."""

    dim: int
    depth: int
    heads: int
    head_dim: int
    mlp_dim: int


def sincos_positions(length: int, dim: int) -> Tensor:
    """Fixed position embedding as in VideoMAE: sine in even, cosine in odd columns. (L, D) float32.

    Source: Vaswani et al. 2017, section 3.5. The position is the token index over (t, h, w). Computed in float64.
    """
    rates = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates  # (L, ceil(D / 2))
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, :dim].float()


def separable_positions(grid: tuple[int, int, int], dim: int) -> Tensor:
    """Fixed position embedding with separate columns for t (a quarter), h and w (three eighths each). (L, D) float32.

    Tokens with the same t, h or w share columns. Short trainings of small models benefit from this.

    Raises:
        ValueError: `dim` is not a multiple of 16.
    """
    if dim % 16:
        raise ValueError(f"pos_embed=sincos_separable needs a width that is a multiple of 16, got {dim}")
    parts = []
    for axis, width in enumerate((dim // 4, dim * 3 // 8, dim * 3 // 8)):
        shape = [1, 1, 1, width]
        shape[axis] = grid[axis]
        parts.append(sincos_positions(grid[axis], width).view(shape).expand(*grid, width))
    return torch.cat(parts, dim=3).flatten(0, 2)


def position_table(config: EncoderConfig, dim: int) -> Tensor:
    """The fixed position embedding of an encoder or decoder of width `dim`. (1, L, D)."""
    if config.pos_embed == "sincos_separable":
        return separable_positions(config.grid, dim)[None]
    return sincos_positions(config.num_tokens, dim)[None]


def split_into_patches(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """View a clip as its patches. (B, C, T, H, W) -> (B, t, h, w, C, pt, ph, pw)."""
    t, h, w = grid
    patches: Tensor = (
        x.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1)).permute(0, 2, 4, 6, 1, 3, 5, 7)
    )
    return patches


def gather_patches(x: Tensor, index: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Copy the patches of the tokens `index`. (B, C, T, H, W), (B, N) -> (B, N, C, pt, ph, pw)."""
    _, h, w = grid
    patches = split_into_patches(x, grid)
    clip = torch.arange(x.shape[0], device=x.device)[:, None]
    found: Tensor = patches[clip, index // (h * w), index // w % h, index % w]
    return found


def masked_indices(index: Tensor, length: int) -> Tensor:
    """The sorted token indices that are not in `index`. (B, N) of distinct values -> (B, length - N)."""
    is_given = torch.zeros(index.shape[0], length, dtype=torch.uint8, device=index.device)
    is_given.scatter_(1, index, 1)
    # a stable sort keeps the order of the others and, unlike `nonzero`, reads no value of a GPU
    return is_given.argsort(dim=1, stable=True)[:, : length - index.shape[1]]


class Attention(TimmAttention):
    """timm's attention layer for any head width and any dtype.

    timm 1.0.31 reshapes the output to the width, which fails if heads * head_dim differs from it. Its `k_bias` is a
    buffer, which stays in fp32 when DeepSpeed casts the parameters to bf16.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.num_heads, -1))
        out = attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, heads, N, head_dim)
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected


def _make_block(g: EncoderConfig | DecoderConfig, eps: float, drop_path: float = 0.0) -> Block:
    block = Block(
        g.dim,
        g.heads,
        qkv_bias=True,
        mlp_ratio=g.mlp_dim / g.dim,
        attn_head_dim=g.head_dim,
        drop_path=drop_path,
        norm_layer=cast(type[nn.Module], partial(LayerNorm, eps=eps)),
    )
    block.attn = Attention(g.dim, g.heads, qkv_bias=True, attn_head_dim=g.head_dim)
    return block


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class _PatchEmbed(nn.Module):
    """VideoMAE's tubelet embedding: the weights of a Conv3d, applied to gathered patches."""

    def __init__(self, g: EncoderConfig) -> None:
        super().__init__()
        kernel = (g.tubelet, g.patch, g.patch)
        self.proj = nn.Conv3d(g.channels, g.dim, kernel, stride=kernel)
        nn.init.xavier_uniform_(self.proj.weight.data.view(g.dim, -1))  # initialized like a linear layer

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, C, pt, ph, pw) -> (B, N, D)."""
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """The ViT that is pretrained, distilled and evaluated.

    `drop_path` is the stochastic depth rate of the last block. Rates increase linearly from 0. Used in training only.
    """

    def __init__(self, config: EncoderConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        g = self.config = config
        self.checkpoint_activations = False
        self.patch_embed = _PatchEmbed(g)
        if g.pos_embed == "learned":
            self.pos_embed = nn.Parameter(position_table(g, g.dim))
        else:
            self.register_buffer("pos_embed", position_table(g, g.dim), persistent=False)
        rates = [drop_path * i / max(g.depth - 1, 1) for i in range(g.depth)]
        self.blocks = nn.ModuleList(_make_block(g, g.layer_norm_eps, rate) for rate in rates)
        self.norm = nn.LayerNorm(g.dim, eps=g.layer_norm_eps) if g.final_norm else nn.Identity()
        self.blocks.apply(_init_weights)

    def set_activation_checkpointing(self, is_enabled: bool) -> None:
        """Whether each block recomputes its activations in the backward pass of a training."""
        self.checkpoint_activations = is_enabled

    def forward(self, x: Tensor, visible: Tensor | None = None, num_layers: int = 1) -> Tensor:
        """Encode the tokens `visible`; None: all. (B, C, T, H, W) normalized, int64 (B, Lv) -> (B, Lv, D).

        With `num_layers` > 1 the result is the mean of the outputs of the last blocks, each after the final norm.

        Raises:
            ValueError: the clips have another size.
        """
        g = self.config
        expected = (g.channels, g.num_frames, g.height, g.width)
        if x.shape[1:] != expected:
            raise ValueError(f"encoder expects clips (C, T, H, W) = {expected}, got {tuple(x.shape[1:])}")
        if visible is None:
            tokens = self.patch_embed(split_into_patches(x, g.grid).flatten(1, 3))  # (B, L, D)
            tokens = tokens + self.pos_embed.to(tokens.dtype)
        else:
            tokens = self.patch_embed(gather_patches(x, visible, g.grid))  # (B, Lv, D)
            tokens = tokens + self.pos_embed[0][visible].to(tokens.dtype)
        outputs = []
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpoint_activations and self.training:
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
            if number > len(self.blocks) - num_layers:
                outputs.append(self.norm(tokens))
        last: Tensor = outputs[0] if num_layers == 1 else torch.stack(outputs).mean(dim=0)
        return last

    def embed(
        self, x: Tensor, visible: Tensor | None = None, pooling: Pooling = _MEAN, weights: Tensor | None = None
    ) -> Tensor:
        """The clip feature, (B, D): by default LayerNorm without affine weights of the mean over the encoded tokens.

        This is MM-CDFSL's feature (arXiv 2405.19917, section 3.3) with a norm that has no parameters. The classifier of
        joint pretraining has a norm of its own, which is not part of the feature (`mmdistill.models.joint`). For other
        features, which may be wider, and `weights` (B, L) see `Pooling`.
        """
        tokens = self(x, visible) if pooling.num_layers == 1 else self(x, visible, pooling.num_layers)
        return pooling(tokens, visible, self.config.grid, weights)

    def embed_times(self, x: Tensor) -> Tensor:
        """As `embed`, but with one feature per tubelet: the mean over the tokens of one time. (B, t, D)."""
        tokens = self(x).unflatten(1, (self.config.grid[0], -1))  # (B, t, h * w, D)
        return F.layer_norm(tokens.mean(dim=2), (self.config.dim,), eps=1e-6)


class _Decoder(nn.Module):
    """VideoMAE's decoder and prediction head."""

    pos_embed: Tensor

    def __init__(self, g: DecoderConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_make_block(g, encoder.layer_norm_eps) for _ in range(g.depth))
        self.norm = nn.LayerNorm(g.dim, eps=1e-6)
        self.head = nn.Linear(g.dim, encoder.patch_dim)
        self.channels = encoder.channels
        self.register_buffer("pos_embed", position_table(encoder, g.dim), persistent=False)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor, last: int) -> Tensor:
        """Decode all tokens and predict the values of the last ones. (B, N, Dd) -> (B, last, P).

        The rows of the head are in VideoMAE's order, (pt, ph, pw, C); the predictions are in the order (C, pt, ph, pw).
        """
        for block in self.blocks:
            tokens = block(tokens)
        rows = (self.head.weight, self.head.bias)
        weight, bias = (p.unflatten(0, (-1, self.channels)).transpose(0, 1).flatten(0, 1) for p in rows)
        return F.linear(self.norm(tokens[:, -last:]), weight, bias)


class VideoMAE(nn.Module):
    """Masked autoencoder: encodes visible tokens and predicts the values of removed tokens."""

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.decoder_config = decoder
        self.encoder = Encoder(encoder, drop_path=drop_path)
        self.encoder_to_decoder = nn.Linear(encoder.dim, decoder.dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.decoder = _Decoder(decoder, encoder)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.xavier_uniform_(self.encoder_to_decoder.weight)

    def forward(self, x: Tensor, visible: Tensor, predict: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict the removed tokens. (B, C, T, H, W) normalized, int64 (B, Lv) -> (B, Lp, P), int64 (B, Lp).

        Returns the predictions, values in the order (C, pt, ph, pw) of `patch_targets`, and the indices of their
        tokens: `predict`, or all tokens that are not visible. A subset of these is the dual masking of VideoMAE V2
        (arXiv 2303.16727, section 3.2).
        """
        return self.decode(self.encoder(x, visible), visible, predict)

    def decode(self, tokens: Tensor, visible: Tensor, predict: Tensor | None) -> tuple[Tensor, Tensor]:
        """The results of `forward` from the encoded tokens. (B, Lv, D), int64 (B, Lv) -> (B, Lp, P), int64 (B, Lp)."""
        if predict is None:
            predict = masked_indices(visible, self.encoder.config.num_tokens)
        pos = self.decoder.pos_embed[0]
        seen = self.encoder_to_decoder(tokens)
        seen = seen + pos[visible].to(seen.dtype)
        hidden = self.mask_token.to(seen.dtype) + pos[predict].to(seen.dtype)
        predictions: Tensor = self.decoder(torch.cat((seen, hidden), dim=1), predict.shape[1])
        return predictions, predict
