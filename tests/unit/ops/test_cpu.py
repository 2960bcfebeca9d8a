"""CPU kernels against their formulas, values and gradients."""

import pytest
import torch
from torch import Tensor

from mmdistill.models.attention import attention
from mmdistill.ops import cpu


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5)
    return torch.einsum("bhnm,bhmd->bhnd", weights / weights.sum(-1, keepdim=True), v)


@pytest.mark.parametrize(
    ("short_tokens", "max_saved"), [(64, 0), (4, 10**6), (4, 0)], ids=["short", "long, saved", "long"]
)
@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(("heads", "queries"), [(3, 11), (4, 7), (1, 10)])
def test_attention_values_and_gradients(
    short_tokens: int, max_saved: int, threads: int, heads: int, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "SHORT_CLIP_TOKENS", short_tokens)
    monkeypatch.setattr(cpu, "MAX_SAVED_PROBABILITIES", max_saved)
    monkeypatch.setattr(cpu, "MIN_CHUNK_QUERIES", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    q = torch.randn(2, heads, queries, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, heads, 11, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, heads, queries, 5, dtype=torch.float64)
    found, expected = (
        (out := function(q, k, v), *torch.autograd.grad((out * weight).sum(), (q, k, v)))
        for function in (attention, _formula)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), expected[0], atol=1e-12, rtol=1e-10)


def test_heads_that_do_not_fill_the_threads_are_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(cpu, "SHORT_CLIP_TOKENS", 4)
    monkeypatch.setattr(cpu, "MAX_SAVED_PROBABILITIES", 0)
    monkeypatch.setattr(cpu, "MIN_CHUNK_QUERIES", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: shapes.append(q.shape) or fused(q, k, v)
    )
    for clips, min_queries in ((1, 2), (2, 2), (3, 2), (1, 5)):
        monkeypatch.setattr(cpu, "MIN_CHUNK_QUERIES", min_queries)
        q, k, v = torch.randn(3, clips, 3, 9, 4, requires_grad=True)
        attention(q, k, v)
    # third head in two chunks; an even share needs none; nine heads do not pay off; chunks would be too small
    assert shapes == [(2, 1, 5, 4), (1, 2, 9, 4), (2, 3, 9, 4), (3, 3, 9, 4), (1, 3, 9, 4)]


@pytest.mark.parametrize("rows", [1, 300])
def test_mse_and_its_gradient(rows: int) -> None:
    """300 rows are more than one chunk."""
    a = torch.randn(rows, 6, requires_grad=True)
    b = torch.randn(rows, 6)
    loss = cpu.ChunkedMSE.apply(a, b)
    difference = a.detach().double() - b.double()
    assert loss.item() == pytest.approx(difference.square().mean().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(3 * loss, a)
    torch.testing.assert_close(gradient.double(), 3 * 2 * difference / difference.numel(), atol=1e-9, rtol=1e-6)
