"""Architecture of an encoder, from its metadata or from the shapes of its tensors."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.formats.huggingface import CONFIG, ModelSettings
from mmdistill.errors import format_count
from mmdistill.models.videomae import DecoderConfig, EncoderConfig, sincos_positions

# Number of heads of VideoMAE's and VideoMAE V2's models by width; head_dim = width // heads.
_NUM_HEADS_BY_WIDTH = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_DECODER_NUM_HEADS_BY_WIDTH = {640: 8}  # ViT-H of VideoMAE, whose head width is 80
_NUM_HEADS_CANDIDATES = (12, 16, 6, 3, 8)  # tried in this order if heads * head_dim is not the width
_DEFAULT_NUM_FRAMES, _DEFAULT_GRID_SIDE = 16, 14  # VideoMAE's clip length and 224 / 16, for files without metadata


def encoder_config_from_meta(fields: Mapping[str, Any]) -> EncoderConfig:
    """Build the encoder config from metadata. Raises `CheckpointError` for missing or invalid fields."""
    known = {f.name for f in dataclasses.fields(EncoderConfig)}
    if "pos_embed" not in fields:  # written before the key was introduced
        fixed = "sincos_separable" if fields.get("separable_positions") else "sincos"
        fields = {**fields, "pos_embed": "learned" if fields.get("learned_positions") else fixed}
    try:
        return EncoderConfig(**{k: v for k, v in fields.items() if k in known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the encoder config in the metadata is incomplete ({error})") from error


def _infer_num_heads(dim: int, inner: int, heads: int | None = None, part: str = "") -> int:
    if heads is not None:
        if inner % heads:
            raise CheckpointError(f"the attention width {inner} is not a multiple of heads={heads}")
        return heads
    if inner == dim:
        candidates = [_NUM_HEADS_BY_WIDTH[dim]] if dim in _NUM_HEADS_BY_WIDTH else [dim // 64] if dim % 64 == 0 else []
    else:
        candidates = [count for count in _NUM_HEADS_CANDIDATES if dim // count * count == inner]
    if not candidates:
        raise CheckpointError(
            f"the number of heads cannot be inferred from width {dim} and attention width {inner}; write a file "
            f"that states it: mmdistill convert FILE NEW.safetensors --{part}heads=N"
            f"{'' if part else ' (Python: load_encoder(FILE, heads=N))'}"
        )
    return candidates[0]


def is_sincos(positions: Tensor) -> bool:
    """Whether (1, L, D) is the fixed sin-cos table rather than learned position embeddings."""
    _, length, dim = positions.shape
    return bool(torch.allclose(positions[0].float(), sincos_positions(length, dim), atol=1e-5))


def infer_token_grid(tokens: int, frames: int) -> tuple[int, int, int]:
    """Infer (t, h, w) of `tokens` positions over `frames` tubelets: square, or else closest to h : w = 7 : 12."""
    t = frames if tokens % frames == 0 else math.gcd(tokens, frames)
    area = tokens // t
    side = math.isqrt(area)
    if side * side == area:
        return t, side, side
    pairs = [(h, area // h) for h in range(1, side + 1) if area % h == 0]
    h, w = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1] / (7 / 12))))
    return t, h, w


def encoder_config_from_tensors(
    state: Mapping[str, Tensor],
    *,
    settings: ModelSettings | None = None,
    has_fc_norm: bool = False,
    heads: int | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> tuple[EncoderConfig, list[str]]:
    """Infer the config of an encoder from its tensors (names without ``encoder.``), and a sentence per assumption.

    `settings` are those of a ``config.json``; `heads` and the input size replace its values. Without `settings`,
    `heads` is needed if the tensors do not determine it. The input size (frames, pixels) is not stored in files without
    learned positions; its default is VideoMAE's 16 frames of 14 x 14 patches. `has_fc_norm`: the file has the norm of a
    classifier on the mean of the tokens; such models have no norm after the last block.

    Raises:
        CheckpointError: the tensors are not those of an encoder, do not determine the number of heads, or contradict
            `settings`.
    """
    settings = settings or ModelSettings()
    notes = []
    try:
        conv, fc1 = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
        qkv = state["blocks.0.attn.qkv.weight"]
    except KeyError as error:
        raise CheckpointError(f"not an encoder: the tensor {error} is missing") from error
    if conv.ndim != 5 or conv.shape[3] != conv.shape[4]:
        raise CheckpointError(
            f"patch_embed.proj.weight has shape {list(conv.shape)}, expected [D, C, t, p, p] as in VideoMAE"
        )
    dim, channels, tubelet, patch, _ = conv.shape
    inner = qkv.shape[0] // 3
    heads = heads or settings.heads
    num_heads = _infer_num_heads(dim, inner, heads)
    if heads is None and not (inner == dim and dim in _NUM_HEADS_BY_WIDTH):
        notes.append(
            f"{format_count(num_heads, 'head')} of {inner // num_heads} inferred from the attention width {inner}"
        )
    positions = state.get("pos_embed")
    stated_size = (settings.num_frames, settings.height, settings.width)
    size = [given or stated for given, stated in zip((num_frames, height, width), stated_size, strict=True)]
    if settings.num_frames and size != list(stated_size):
        notes.append(f"input of {_format_size(size)} instead of {_format_size(stated_size)} in {CONFIG}")
    num_frames, height, width = size
    if positions is not None:
        t, h, w = infer_token_grid(positions.shape[1], (num_frames or _DEFAULT_NUM_FRAMES) // tubelet)
    else:
        t, h, w = max(_DEFAULT_NUM_FRAMES // tubelet, 1), _DEFAULT_GRID_SIDE, _DEFAULT_GRID_SIDE
        if num_frames is None or height is None or width is None:
            notes.append("the file has no input size; the default of VideoMAE is used: 16 frames of 14 x 14 patches")
    config = EncoderConfig(
        channels=channels,
        num_frames=num_frames or t * tubelet,
        height=height or h * patch,
        width=width or w * patch,
        patch=patch,
        tubelet=tubelet,
        dim=dim,
        depth=count_blocks(state),
        heads=num_heads,
        head_dim=inner // num_heads,
        mlp_dim=fc1.shape[0],
        pos_embed="sincos" if positions is None or is_sincos(positions) else "learned",
        final_norm="norm.weight" in state or not (has_fc_norm or settings.has_mean_pooling),
        layer_norm_eps=settings.layer_norm_eps,
    )
    _check_settings(config, settings)
    if not config.final_norm:
        notes.append("no norm after the last block, as in models fine-tuned with mean pooling")
    return config, notes


def _format_size(size: Sequence[int | None]) -> str:
    return "{} frames of {} x {} px".format(*size)


def _check_settings(config: EncoderConfig, settings: ModelSettings) -> None:
    """Raise `CheckpointError` if the tensors contradict ``config.json``."""
    stated = dict(settings.tensor_sizes)
    found = {name: getattr(config, name) for name in stated}
    if config.final_norm and settings.has_mean_pooling:
        stated["norms after the last block"], found["norms after the last block"] = 0, 1  # use_mean_pooling=true
    if differences := [f"{name} {found[name]} / {stated[name]}" for name in stated if found[name] != stated[name]]:
        raise CheckpointError(
            f"the tensors do not fit {CONFIG} beside them (tensors / {CONFIG}): {', '.join(differences)}; copy the "
            f"{CONFIG} of these weights"
        )


def count_blocks(state: Mapping[str, Tensor], prefix: str = "blocks.") -> int:
    """Number of transformer blocks: the highest index after `prefix`, plus 1."""
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))


def decoder_config_from_tensors(state: Mapping[str, Tensor], heads: int | None = None) -> DecoderConfig | None:
    """Infer the config of the decoder from ``decoder.*`` tensors; None if there are none. `heads`: if known."""
    if "decoder.blocks.0.attn.qkv.weight" not in state:
        return None
    rows, dim = state["decoder.blocks.0.attn.qkv.weight"].shape
    inner = rows // 3
    heads = _infer_num_heads(dim, inner, heads or _DECODER_NUM_HEADS_BY_WIDTH.get(dim), "decoder-")
    mlp_dim = state["decoder.blocks.0.mlp.fc1.weight"].shape[0]
    return DecoderConfig(dim, count_blocks(state, "decoder.blocks."), heads, inner // heads, mlp_dim)


def resize_positions(positions: Tensor, source: tuple[int, int, int], target: tuple[int, int, int]) -> Tensor:
    """Interpolate learned positions (1, L, D) to another token grid, trilinearly in (T, H, W): (1, L', D)."""
    dim = positions.shape[2]
    grid = positions.float().view(1, *source, dim).permute(0, 4, 1, 2, 3)
    out = torch.nn.functional.interpolate(grid, size=target, mode="trilinear", align_corners=False)
    return out.permute(0, 2, 3, 4, 1).reshape(1, -1, dim).to(positions.dtype)
