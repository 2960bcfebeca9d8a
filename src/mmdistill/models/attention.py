"""Softmax attention, timm's layer around it, and the way that is fastest on a CPU for each length."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention as TimmAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORT = 1024  # tokens; up to here the probabilities of one layer and head (4 MiB) stay in the caches between products
_LEAST = 512  # queries in a part: each part copies the keys and values


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, equation 1). (B, heads, N or M, d) -> (B, heads, N, d)

    torch's fused kernel, but for its backward pass on a CPU, measured on two cores in float32:

    - It computes the probabilities anew. Short clips keep them instead, B * heads * N * M values (`_Kept`).
    - It gives each thread whole heads, so of three heads on two threads one has a thread to itself. Queries are
      independent of each other: parts of the heads that do not fill the threads pass as clips of their own, 119 ms
      against 161 ms for 2,688 tokens.
    """
    if q.device.type != "cpu" or q.dtype.itemsize < 4 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v)
    if k.shape[2] <= _SHORT:
        return _Kept.apply(q, k, v)
    b, heads, n, _ = q.shape
    threads = torch.get_num_threads()
    rest = next(r for r in range(heads + 1) if b * (heads - r) % threads == 0)  # heads that do not fill the threads
    parts = min(threads // math.gcd(b * rest, threads), n // _LEAST)
    if parts < 2 or b * heads >= 4 * threads:
        return F.scaled_dot_product_attention(q, k, v)
    whole, split = zip(*(x.split((heads - rest, rest), dim=1) for x in (q, k, v)), strict=True)
    out = _in_parts(*split, parts)
    return out if rest == heads else torch.cat((F.scaled_dot_product_attention(*whole), out), dim=1)


class _Kept(torch.autograd.Function):
    """Attention that keeps its probabilities, each product written over the one before it.

    672 tokens of 6 heads take 17 ms forward and backward on two cores in float32; autograd's own steps through the same
    formula 22 ms, with three more matrices of B * heads * N * M values; the fused kernel 23 ms.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q / math.sqrt(q.shape[3])) @ k.transpose(2, 3)
        kept = torch.softmax(scores, 3, out=scores)
        out = kept @ v
        ctx.save_for_backward(q, k, v, kept, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, kept, out = ctx.saved_tensors
        # the softmax's own gradient, p (g - sum p g); the sum is that of grad * out (Dao et al. 2022, appendix B.4)
        scores = grad @ v.transpose(2, 3)
        scores.sub_((grad * out).sum(3, keepdim=True)).mul_(kept)
        grad_k = scores.transpose(2, 3) @ (q / math.sqrt(q.shape[3]))
        return (scores @ k).div_(math.sqrt(q.shape[3])), grad_k, kept.transpose(2, 3) @ grad


def _in_parts(q: Tensor, k: Tensor, v: Tensor, parts: int) -> Tensor:
    """Attention with the queries in equal parts that pass as clips of their own."""
    b, _, n, _ = q.shape
    rows = -(-n // parts)
    q = F.pad(q, (0, 0, 0, rows * parts - n)).unflatten(2, (parts, rows)).transpose(1, 2).flatten(0, 1)
    k, v = (x[:, None].expand(b, parts, *x.shape[1:]).flatten(0, 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v)
    return out.unflatten(0, (b, parts)).transpose(1, 2).flatten(2, 3)[:, :, :n]


class Attention(TimmAttention):
    """timm's attention, of any head width and in any dtype.

    timm 1.0.31 reshapes to the width, which fails where heads * head_dim differs from it; and its `k_bias` is a buffer
    that DeepSpeed leaves in fp32 when it casts the parameters to bf16.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, last: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or (B, last, D): only what the `last` tokens gather from all of them."""
        b, n, _ = x.shape
        if last is None or last == n:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
            q, k, v = F.linear(x, self.qkv.weight, bias).view(b, n, 3, self.num_heads, -1).unbind(2)
        else:
            inner = self.q_bias.shape[0]
            bias = torch.cat((torch.zeros_like(self.q_bias), self.v_bias))
            k, v = F.linear(x, self.qkv.weight[inner:], bias).view(b, n, 2, self.num_heads, -1).unbind(2)
            q = F.linear(x[:, -last:], self.qkv.weight[:inner], self.q_bias).view(b, last, self.num_heads, -1)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, heads, N or last, head_dim)
        return self.proj(out.transpose(1, 2).flatten(2))
