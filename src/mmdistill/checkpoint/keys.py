"""Names of tensors. Pure functions from names to names; no function opens a file.

Canonical names are VideoMAE's: ``encoder.patch_embed.proj.weight``, ``encoder.blocks.0.attn.qkv.weight``, ...,
``encoder_to_decoder.weight``, ``mask_token``, ``decoder.*`` for a pretrained model (an average of its encoder is
``encoder_ema.encoder.*``), and the same ``encoder.*`` under
``student_rgb.`` or ``teacher_X.`` together with ``cmt.*`` for a distilled one.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mmdistill.checkpoint.errors import CheckpointError

WRAPPERS = ("module.", "_forward_module.", "model.", "_orig_mod.")
COMPONENT_PREFIXES = ("student_", "teacher_")  # names of the encoders in a distilled checkpoint
ENCODER_EMA = "encoder_ema"  # average of the encoder in a pretraining checkpoint
_ENCODER_FIELDS = ("patch_embed.", "blocks.", "norm.", "pos_embed")
_PROBE = "patch_embed.proj.weight"
_HF_PROBE = "embeddings.patch_embeddings.projection.weight"

_HF_LAYER = {
    "attention.attention.q_bias": "attn.q_bias",
    "attention.attention.v_bias": "attn.v_bias",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.output.dense.weight": "attn.proj.weight",
    "attention.output.dense.bias": "attn.proj.bias",
    "intermediate.dense.weight": "mlp.fc1.weight",
    "intermediate.dense.bias": "mlp.fc1.bias",
    "output.dense.weight": "mlp.fc2.weight",
    "output.dense.bias": "mlp.fc2.bias",
    "layernorm_before.weight": "norm1.weight",
    "layernorm_before.bias": "norm1.bias",
    "layernorm_after.weight": "norm2.weight",
    "layernorm_after.bias": "norm2.bias",
}
_HF_QKV = tuple(f"attention.attention.{name}.weight" for name in ("query", "key", "value"))


def canonical_name(key: str) -> str:
    """Remove the prefixes that DeepSpeed, Lightning's strategy, DDP or torch.compile add to a name.

    Only complete prefixes are removed. ``_orig_mod`` is removed at any position, because torch.compile may wrap a
    submodule.
    """
    while True:
        shorter = key
        for prefix in WRAPPERS:
            shorter = shorter.removeprefix(prefix)
        if shorter == key:
            return ".".join(field for field in key.split(".") if field != "_orig_mod")
        key = shorter


def canonical_names(keys: Iterable[str]) -> dict[str, str]:
    """Map each name of a state_dict to its canonical name.

    A bare encoder (``blocks.0...`` without ``encoder.``, as in VideoMAE's fine-tuned releases) gets the prefix
    ``encoder.``; other names at its level, such as those of classifiers, do not change.

    Raises:
        CheckpointError: two names become the same.
    """
    names = {key: canonical_name(key) for key in keys}
    bare = [n.removesuffix(_PROBE) for n in names.values() if n.endswith(_PROBE)]
    roots = [root for root in bare if not (root == "encoder." or root.endswith(".encoder."))]
    for key, name in names.items():
        for root in roots:
            if name.startswith(root) and name.removeprefix(root).startswith(_ENCODER_FIELDS):
                names[key] = f"{root}encoder.{name.removeprefix(root)}"
                break
    seen: dict[str, str] = {}
    for key, name in names.items():
        if name in seen:
            raise CheckpointError(
                f"'{seen[name]}' and '{key}' have the same name after the removal of wrapper prefixes; rename one"
            )
        seen[name] = key
    return names


def canonical_state(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a file to canonical names, Hugging Face's and timm's included.

    Raises:
        CheckpointError: two names become the same, or a Hugging Face tensor is missing.
    """
    names = canonical_names(raw)
    state = {names[key]: tensor for key, tensor in raw.items()}
    try:
        return split_qkv_bias(from_huggingface(state) if is_huggingface(state) else state)
    except KeyError as error:
        raise CheckpointError(
            f"the Hugging Face tensor {error} is missing; the file is incomplete, copy it again"
        ) from error


def encoder_roots(keys: Iterable[str]) -> list[str]:
    """Prefixes of the encoders in canonical names: ``['encoder.']`` or ``['student_rgb.encoder.', ...]``."""
    return [key.removesuffix(_PROBE) for key in keys if key == _PROBE or key.endswith("." + _PROBE)]


def component_of(root: str) -> str:
    """Component of an encoder's prefix: ``student_rgb.encoder.`` -> ``student_rgb``, ``encoder.`` -> ``encoder``."""
    return root.removesuffix("encoder.").removesuffix(".") or "encoder"


def top_level(key: str) -> str:
    """First field of a canonical name, for reports: ``student_rgb``, ``cmt``, ``encoder``, ``decoder``..."""
    return key.split(".", 1)[0]


def is_huggingface(keys: Iterable[str]) -> bool:
    """Whether the names are those of ``transformers``' VideoMAE."""
    return any(key.endswith(_HF_PROBE) for key in keys)


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert Hugging Face's VideoMAE names to canonical ones; query, key and value become one ``qkv`` weight.

    Reads VideoMAEModel, VideoMAEForPreTraining and VideoMAEForVideoClassification, whose classifiers keep their names.
    A key bias, which some conversions contain, is dropped: it does not change softmax attention.
    """
    base = next(key for key in state if key.endswith(_HF_PROBE)).removesuffix(_HF_PROBE)  # "" or "videomae."
    decoder = any(key.startswith("decoder.decoder_layers.") for key in state)
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(base)
        if layer := re.fullmatch(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)", name):
            stack, index, field = layer.groups()
            target = f"{'encoder' if stack == 'encoder.layer' else 'decoder'}.blocks.{index}."
            if field in _HF_LAYER:
                out[target + _HF_LAYER[field]] = tensor
            elif field == _HF_QKV[0]:
                out[target + "attn.qkv.weight"] = torch.cat([state[key.removesuffix(field) + f] for f in _HF_QKV])
            elif field not in _HF_QKV[1:]:
                out[key] = tensor
        elif name.startswith("embeddings.patch_embeddings.projection."):
            out["encoder.patch_embed.proj." + name.rsplit(".", 1)[1]] = tensor
        elif name.startswith("layernorm."):
            out["encoder.norm." + name.removeprefix("layernorm.")] = tensor
        elif name == "embeddings.position_embeddings":
            out["encoder.pos_embed"] = tensor
        elif not (decoder and name == "position_embeddings"):  # the decoder's fixed table
            out[name] = tensor
    return out


def to_huggingface(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert an encoder's tensors (names without ``encoder.``) to the names that VideoMAEModel reads from disk.

    Biases of queries and values are stored under both names: transformers 4 reads only ``q_bias``, some releases of
    transformers 5 (5.17) only ``query.bias``, and a missing tensor is initialized randomly with only a warning.
    """
    hf_fields: dict[str, list[str]] = {}
    for hf_field, field in _HF_LAYER.items():
        hf_fields.setdefault(field, []).append(hf_field)
    out: dict[str, Tensor] = {}
    for key, tensor in encoder.items():
        if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
            base, field = f"encoder.layer.{block[1]}.", block[2]
            if field == "attn.qkv.weight":
                out.update({base + name: chunk.clone() for name, chunk in zip(_HF_QKV, tensor.chunk(3), strict=True)})
            else:
                out.update({base + name: tensor.clone() for name in hf_fields[field]})
        elif key.startswith("patch_embed.proj."):
            out["embeddings.patch_embeddings.projection." + key.rsplit(".", 1)[1]] = tensor
        elif key.startswith("norm."):
            out["layernorm." + key.removeprefix("norm.")] = tensor
    return out


def split_qkv_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split ``attn.qkv.bias`` (timm's ViT, LayerNorm-free conversions) into VideoMAE's ``q_bias`` and ``v_bias``.

    The key bias is dropped: it adds the same number to all logits of a query, which does not change the softmax.
    If no attention layer of the file has biases (``qkv_bias=False``), they are zero.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            base = key.removesuffix("qkv.bias")
            out[base + "q_bias"], out[base + "v_bias"] = q.clone(), v.clone()
        elif not key.endswith("attn.k_bias"):
            out[key] = tensor
    if not any(key.endswith(("attn.q_bias", "attn.v_bias")) for key in out):
        for key in [key for key in out if key.endswith("attn.qkv.weight")]:
            zeros = torch.zeros(out[key].shape[0] // 3, dtype=out[key].dtype)
            base = key.removesuffix("qkv.weight")
            out[base + "q_bias"], out[base + "v_bias"] = zeros, zeros.clone()
    return out
