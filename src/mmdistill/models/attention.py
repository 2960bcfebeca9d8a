"""Attention in bf16 on a CPU: softmax(Q Kᵀ / √d) V as matrix products of blocks of rows.

torch's fused attention computes its bf16 products on a CPU with less than half of the speed of `torch.bmm`, and its
backward pass takes 2.5 times as long as its forward pass. docs/speed.md lists both. In float32 the fused attention is
faster.

Shapes: B batch, H heads, N tokens, d head width, R rows of a block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK_ROWS = 168  # R; of 84 to 2,688 rows the fastest at 268, 672 and 2,688 tokens
MAX_KEPT_BYTES = 64 * 2**20  # size of the probabilities up to which the backward pass reads those of the forward pass


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention without a mask. Three times (B, H, N, d) -> (B, H, N, d).

    It is torch's fused attention except for bf16 on a CPU outside a compiled model. There, the scores and the
    probabilities are rounded to bf16.
    """
    if q.device.type != "cpu" or q.dtype is not torch.bfloat16 or torch.compiler.is_compiling():
        fused: Tensor = F.scaled_dot_product_attention(q, k, v)
        return fused
    batch = q.shape[:2]
    flat = (q.flatten(0, 1) * q.shape[-1] ** -0.5, k.flatten(0, 1), v.flatten(0, 1))
    with torch.autocast("cpu", enabled=False):  # which computes a softmax in float32
        out: Tensor = _BlockAttention.apply(*flat) if torch.is_grad_enabled() else _forward(*flat, None)
    heads: Tensor = out.unflatten(0, batch)
    return heads


def _forward(q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor] | None) -> Tensor:
    """(B * H, N, d) -> (B * H, N, d). The probabilities of each block are appended to `kept`."""
    out = torch.empty_like(q)
    for rows in _blocks(q):
        p = _probabilities(q[:, rows], k)
        out[:, rows] = torch.bmm(p, v)
        if kept is not None:
            kept.append(p)
    return out


def _blocks(q: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, q.shape[1], BLOCK_ROWS)]


def _probabilities(rows: Tensor, k: Tensor) -> Tensor:
    """(B * H, R, d), (B * H, N, d) -> (B * H, R, N)."""
    return torch.softmax(torch.bmm(rows, k.transpose(1, 2)), dim=2)


class _BlockAttention(torch.autograd.Function):
    """`_forward` with its gradients.

    With P = softmax(Q Kᵀ) and the gradient G of the output they are dV = Pᵀ G, dQ = dS K and dK = dSᵀ Q, where
    dS = P ∘ (G Vᵀ − rowsum(P ∘ G Vᵀ)).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fits = q.shape[0] * q.shape[1] ** 2 * q.element_size() <= MAX_KEPT_BYTES
        kept: list[Tensor] = []
        out = _forward(q, k, v, kept if fits else None)
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for number, rows in enumerate(_blocks(q)):
            p = kept[number] if kept else _probabilities(q[:, rows], k)
            g = grad[:, rows]
            grad_v += torch.bmm(p.transpose(1, 2), g)
            grad_s = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, 2, p.dtype)
            grad_q[:, rows] = torch.bmm(grad_s, k)
            grad_k += torch.bmm(grad_s.transpose(1, 2), q[:, rows])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
