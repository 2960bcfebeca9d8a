"""Attention in bf16 on a CPU, compared with the formula in float64."""

import pytest
import torch
from torch import Tensor

from mmdistill.models import attention as attention_module
from mmdistill.models.attention import BLOCK_ROWS, attention

WIDTH = 16


def _formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(2, 3) / WIDTH**0.5, dim=3) @ v


def _output_and_gradients(inputs: list[Tensor], weights: Tensor, *, by_formula: bool) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = (_formula if by_formula else attention)(*leaves)
    out.backward(weights.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("keeps", [True, False], ids=["keeps the probabilities", "computes them again"])
@pytest.mark.parametrize("num_tokens", [1, 5, BLOCK_ROWS, 2 * BLOCK_ROWS + 3])
def test_output_and_gradients_are_those_of_the_formula(
    num_tokens: int, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_module, "MAX_KEPT_BYTES", 2**30 if keeps else 0)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, num_tokens, WIDTH).bfloat16() for _ in range(3)]
    weights = torch.randn(2, 3, num_tokens, WIDTH).bfloat16()
    found = _output_and_gradients(inputs, weights, by_formula=False)
    expected = _output_and_gradients([x.double() for x in inputs], weights.double(), by_formula=True)
    for own, exact in zip(found, expected, strict=True):
        assert own.dtype is torch.bfloat16
        # the largest value, because the gradients of one token are 0: bf16 has 8 bits
        assert (own.double() - exact).abs().max() <= 0.03 * exact.abs().max() + 1e-6
    with torch.no_grad():
        assert torch.equal(attention(*inputs), found[0])


def test_probabilities_are_kept_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients are the same, because the same products are computed again."""
    torch.manual_seed(0)
    num_tokens = BLOCK_ROWS + 9
    inputs = [torch.randn(1, 2, num_tokens, WIDTH).bfloat16() for _ in range(3)]
    weights = torch.randn(1, 2, num_tokens, WIDTH).bfloat16()

    def count_saved_values(limit: int) -> tuple[int, list[Tensor]]:
        sizes: list[int] = []

        def count(x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return x

        monkeypatch.setattr(attention_module, "MAX_KEPT_BYTES", limit)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            found = _output_and_gradients(inputs, weights, by_formula=False)
        return sum(sizes), found

    size = 2 * num_tokens**2  # of the probabilities of two heads
    with_all, kept = count_saved_values(2 * size)
    without, computed = count_saved_values(2 * size - 1)
    assert with_all - without == size
    assert all(torch.equal(a, b) for a, b in zip(kept, computed, strict=True))


def test_autocast_does_not_change_the_result() -> None:
    """A softmax under autocast is float32, which would take more time and memory."""
    inputs = [torch.randn(1, 2, 9, WIDTH).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(*inputs)
    assert torch.equal(out, attention(*inputs))


def test_float32_uses_the_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_forward", None)
    inputs = [torch.randn(1, 2, 9, WIDTH) for _ in range(3)]
    torch.testing.assert_close(attention(*inputs), _formula(*inputs))
