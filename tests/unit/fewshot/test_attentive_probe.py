"""The attentive probe: its formula, and a task that needs attention."""

import numpy as np
import torch
from torch import nn

from mmdistill.fewshot.attentive_probe import AttentiveProbe, probe_tokens
from mmdistill.fewshot.probe import probe_full_label_set

GROUPS = [f"rally{i % 12}" for i in range(144)]


def test_forward_equals_multi_head_attention_with_one_query() -> None:
    torch.manual_seed(0)
    probe = AttentiveProbe(128, 5)
    nn.init.normal_(probe.value_bias)
    attention = nn.MultiheadAttention(128, 2, batch_first=True)
    eye, key, value = torch.eye(128), probe.key.flatten(0, 1), probe.value.flatten(0, 1)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat((eye, key, value)))
        attention.in_proj_bias.copy_(torch.cat((torch.zeros(128), torch.randn(128), probe.value_bias)))
        attention.out_proj.weight.copy_(probe.project.weight)
        attention.out_proj.bias.copy_(probe.project.bias)
        tokens = torch.randn(3, 7, 128)
        x, query = probe.norm_tokens(tokens), probe.query.view(1, 1, 128).expand(3, 1, 128)
        hidden = (query + attention(query, x, x)[0])[:, 0]
        expected = probe.head(hidden + probe.mlp(probe.norm_mlp(hidden)))
        torch.testing.assert_close(probe(tokens), expected, rtol=1e-4, atol=1e-5)


def _task() -> tuple[np.ndarray, np.ndarray]:
    """One marked token of 8 has the class; an unmarked one has minus its vector, so the mean has no class."""
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(3), 48)[rng.permutation(144)]
    vectors = rng.normal(size=(3, 14))
    tokens = np.zeros((144, 8, 16))
    for clip, label in enumerate(labels):
        marked, other = rng.permutation(8)[:2]
        tokens[clip, :, :14] = 0.1 * rng.normal(size=(8, 14))
        tokens[clip, :, :14] -= tokens[clip, :, :14].mean(axis=0)
        tokens[clip, marked, :14] += vectors[label]
        tokens[clip, other, :14] -= vectors[label]
        tokens[clip, marked, 14] = tokens[clip, other, 15] = 3
    return tokens.astype(np.float16), labels.astype(np.int64)


def test_it_learns_what_the_mean_of_the_tokens_does_not_have() -> None:
    tokens, labels = _task()
    linear = probe_full_label_set(tokens.astype(np.float32).mean(axis=1), labels, groups=GROUPS)
    found = probe_tokens(tokens, labels, groups=GROUPS, seed=0)
    assert linear["linear_top1"] < 0.6
    assert found["attentive_top1"] > 0.9
    assert found["attentive_macro"] > 0.9
    again = probe_tokens(tokens, labels, groups=GROUPS, seed=0)
    assert again["attentive_top1"] == found["attentive_top1"]
