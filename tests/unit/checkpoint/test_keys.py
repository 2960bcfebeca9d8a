import pytest
import torch

from mmdistill.checkpoint.errors import CheckpointError
from mmdistill.checkpoint.keys import (
    canonical_name,
    canonical_names,
    component_of,
    encoder_roots,
    from_huggingface,
    split_qkv_bias,
    to_huggingface,
)
from mmdistill.models.videomae import Encoder, EncoderConfig

CONFIG = EncoderConfig(3, 2, 8, 8, 4, 2, 8, 2, 2, 4, 16)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("module.encoder.norm.weight", "encoder.norm.weight"),
        ("_forward_module.module.student_rgb.encoder.norm.bias", "student_rgb.encoder.norm.bias"),
        ("model.module._orig_mod.cmt.mlp_to_rgb.0.weight", "cmt.mlp_to_rgb.0.weight"),
        ("student_rgb._orig_mod.encoder.norm.bias", "student_rgb.encoder.norm.bias"),
        ("models.encoder.norm.weight", "models.encoder.norm.weight"),  # lstrip and replace get this wrong
        ("encoder.module.weight", "encoder.module.weight"),
        ("modeling.weight", "modeling.weight"),
    ],
)
def test_prefixes_of_wrappers_are_removed(key: str, name: str) -> None:
    assert canonical_name(key) == name


def test_bare_encoder_gets_its_prefix_and_classifiers_do_not() -> None:
    keys = ["patch_embed.proj.weight", "blocks.0.norm1.weight", "norm.weight", "head_verb.weight", "fc_norm.weight"]
    names = canonical_names(keys)
    assert list(names.values()) == [
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.0.norm1.weight",
        "encoder.norm.weight",
        "head_verb.weight",
        "fc_norm.weight",
    ]
    inside = canonical_names(["student_rgb.patch_embed.proj.weight", "student_rgb.blocks.0.norm1.bias", "cmt.x"])
    assert list(inside.values())[:2] == [
        "student_rgb.encoder.patch_embed.proj.weight",
        "student_rgb.encoder.blocks.0.norm1.bias",
    ]


def test_two_equal_names_are_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"'module\.a' and 'a'"):
        canonical_names(["module.a", "a"])


def test_components_of_prefixes() -> None:
    keys = ["student_rgb.encoder.patch_embed.proj.weight", "teacher_flow.encoder.patch_embed.proj.weight", "cmt.x"]
    assert [component_of(root) for root in encoder_roots(keys)] == ["student_rgb", "teacher_flow"]
    assert [component_of(root) for root in encoder_roots(["encoder.patch_embed.proj.weight"])] == ["encoder"]


def test_huggingface_round_trip() -> None:
    state = {f"encoder.{k}": v for k, v in Encoder(CONFIG).state_dict().items()}
    back = from_huggingface(to_huggingface({k.removeprefix("encoder."): v for k, v in state.items()}))
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[k], v) for k, v in state.items())


def test_huggingface_biases_have_both_names() -> None:
    """Each release of transformers knows one of them, or both."""
    state = {k: torch.randn_like(v) for k, v in Encoder(CONFIG).state_dict().items()}
    out = to_huggingface(state)
    for block in range(CONFIG.depth):
        for ours, theirs in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
            for name in (ours, theirs):
                found = out[f"encoder.layer.{block}.attention.attention.{name}"]
                assert torch.equal(found, state[f"blocks.{block}.attn.{ours}"])


def test_key_bias_is_dropped() -> None:
    state = {"blocks.0.attn.qkv.bias": torch.arange(12.0)}
    out = split_qkv_bias(state)
    assert out["blocks.0.attn.q_bias"].tolist() == [0, 1, 2, 3]
    assert out["blocks.0.attn.v_bias"].tolist() == [8, 9, 10, 11]
    assert len(out) == 2
