"""Every way to compute attention gives what its formula says, and so do the gradients."""

import pytest
import torch
from torch import Tensor

from mmdistill.models import attention as module
from mmdistill.models.attention import Attention, attention


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5)
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(("short", "most"), [(64, 0), (4, 10**6), (4, 0)], ids=["short", "long, kept", "long"])
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("heads", "queries"), [(3, 11), (4, 7), (1, 10)])
def test_values_and_gradients(
    short: int, most: int, threads: int, heads: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHORT", short)
    monkeypatch.setattr(module, "_MOST_KEPT", most)
    monkeypatch.setattr(module, "_LEAST", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    q = torch.randn(2, heads, queries, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, heads, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, heads, queries, 5, dtype=torch.float64)
    found, expected = (
        (out := way(q, k, v), *torch.autograd.grad((out * weight).sum(), (q, k, v))) for way in (attention, _formula)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), expected[0], atol=1e-12, rtol=1e-10)


def test_queries_are_shared_out_to_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module, "_SHORT", 4)
    monkeypatch.setattr(module, "_MOST_KEPT", 0)
    monkeypatch.setattr(module, "_LEAST", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: seen.append(q.shape) or fused(q, k, v)
    )
    for clips, least in ((1, 2), (2, 2), (3, 2), (1, 5)):
        monkeypatch.setattr(module, "_LEAST", least)
        q, k, v = torch.randn(3, clips, 3, 9, 4, requires_grad=True)
        attention(q, k, v)
    # the third head in two parts; even shares need none; nine units hardly do; parts may be too small
    assert seen == [(2, 1, 5, 4), (1, 2, 9, 4), (2, 3, 9, 4), (3, 3, 9, 4), (1, 3, 9, 4)]


def test_the_last_tokens_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 2, qkv_bias=True, attn_head_dim=5).double()
    for bias in (layer.q_bias, layer.v_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for last in (1, 3, 7):
        torch.testing.assert_close(layer(x, last=last), layer(x)[:, -last:], atol=1e-12, rtol=1e-10)
