"""Softmax attention, timm's layer around it, and the way that is fastest on a CPU for each length."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention as TimmAttention
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORT = 1024  # tokens; up to here the probabilities of one layer and head (4 MiB) stay in the caches between products
_MOST_KEPT = 24 * 2**20  # probabilities kept for a layer of longer clips: those of one clip of 2,688 tokens and 3 heads
_LEAST = 512  # queries in a part: each part copies the keys and values


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, equation 1). (B, heads, N or M, d) -> (B, heads, N, d)

    torch's fused kernel, but for its backward pass on a CPU, measured on two cores in float32:

    - It computes the probabilities anew. Short clips keep them instead, B * heads * N * M values (`_Kept`), and so does
      a single clip that is long: 87 MB for a layer of 2,688 tokens and 3 heads, 4 % of the pretraining step of ViT-S.
    - It gives each thread whole heads, so of three heads on two threads one has a thread to itself. Queries are
      independent of each other: parts of the heads that do not fill the threads pass as clips of their own, 119 ms
      against 161 ms for 2,688 tokens.
    """
    if q.device.type != "cpu" or q.dtype.itemsize < 4 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v)
    if k.shape[2] <= _SHORT or q.shape[:3].numel() * k.shape[2] <= _MOST_KEPT:
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


def _units(tensors: Iterable[Tensor], *, whole: bool) -> Iterator[tuple[Tensor, ...]]:
    """What is computed together: (B, heads, N, d) as they are, or each head of each clip."""
    return zip(*([x] if whole else [head for clip in x for head in clip] for x in tensors), strict=True)


class _Kept(torch.autograd.Function):
    """Attention that keeps its probabilities, each product written over the one before it.

    672 tokens of 6 heads take 19 to 23 ms forward and backward on two cores in float32; autograd's own steps through
    the same formula 23 ms, with three more matrices of B * heads * N * M values; the fused kernel 25 ms.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, kept = _like(q), []
        for a, b, c, o in _units((q, k, v, out), whole=k.shape[2] <= _SHORT):
            scores = (a / math.sqrt(q.shape[3])) @ b.mT
            kept.append(torch.softmax(scores, -1, out=scores))
            o.copy_(scores @ c)
        ctx.save_for_backward(q, k, v, out, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, *kept = ctx.saved_tensors
        grads = tuple(map(_like, (q, k, v)))
        # the softmax's own gradient, p (g - sum p g); the sum is that of grad * out (Dao et al. 2022, appendix B.4)
        sums = (grad * out).sum(3, keepdim=True)
        units = _units((q, k, v, grad, sums, *grads), whole=kept[0].ndim == 4)
        for (a, b, c, g, total, to_q, to_k, to_v), p in zip(units, kept, strict=True):
            to_v.copy_(p.mT @ g)
            scores = (g @ c.mT).sub_(total).mul_(p)
            to_q.copy_((scores @ b).div_(math.sqrt(q.shape[3])))
            to_k.copy_(scores.mT @ (a / math.sqrt(q.shape[3])))
        return grads


def _like(x: Tensor) -> Tensor:
    """Room for (B, heads, N, d) that lies as (B, N, heads, d), which is how the layer takes it."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


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
