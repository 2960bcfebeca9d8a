"""CPU kernels of attention and of the reconstruction loss. Times are of two cores in float32.

Shapes: B batch, N queries, M keys, d head width, P values of a token.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SHORT_CLIP_TOKENS = 1024  # up to here the probabilities of one layer and head (4 MiB) stay in the caches
MAX_SAVED_PROBABILITIES = 24 * 2**20  # saved per layer of a longer clip: one clip of 2,688 tokens and 3 heads fits
MIN_CHUNK_QUERIES = 512  # each chunk copies the keys and values
MSE_CHUNK_ROWS = 256


def attention_with_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v``, for training on a CPU. (B, heads, N or M, d) -> (B, heads, N, d).

    The backward pass of torch's fused kernel has two costs on a CPU:

    - It recomputes the probabilities. Short clips, and a single long clip, save them instead (`SavedSoftmaxAttention`):
      B * heads * N * M values, 87 MB for a layer of 2,688 tokens and 3 heads. This saves 4 % of the pretraining step of
      ViT-S.
    - It assigns whole heads to threads, so with three heads on two threads one thread idles. The heads that do not fill
      the threads are computed in chunks of queries instead (`chunked_attention`). docs/speed.md states the time saved.
    """
    if k.shape[2] <= SHORT_CLIP_TOKENS or q.shape[:3].numel() * k.shape[2] <= MAX_SAVED_PROBABILITIES:
        out: Tensor = SavedSoftmaxAttention.apply(q, k, v)
        return out
    b, heads, n, _ = q.shape
    threads = torch.get_num_threads()
    rest = next(r for r in range(heads + 1) if b * (heads - r) % threads == 0)  # heads that do not fill the threads
    chunks = min(threads // math.gcd(b * rest, threads), n // MIN_CHUNK_QUERIES)
    if chunks < 2 or b * heads >= 4 * threads:
        return F.scaled_dot_product_attention(q, k, v)
    even, uneven = zip(*(x.split((heads - rest, rest), dim=1) for x in (q, k, v)), strict=True)
    q, k, v = uneven
    out = chunked_attention(q, k, v, chunks)
    return out if rest == heads else torch.cat((F.scaled_dot_product_attention(*even), out), dim=1)


class SavedSoftmaxAttention(torch.autograd.Function):
    """Attention that saves its probabilities for the backward pass and reuses one buffer for all products.

    672 tokens of 6 heads take 19 to 23 ms forward and backward. Autograd of the same formula takes 23 ms and three more
    matrices of B * heads * N * M values. The fused kernel takes 25 ms.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, N or M, d) -> (B, heads, N, d)."""
        out, saved = _empty_like(q), []
        for a, b, c, o in _chunks((q, k, v, out), per_head=k.shape[2] > SHORT_CLIP_TOKENS):
            scores = (a / math.sqrt(q.shape[3])) @ b.mT
            saved.append(torch.softmax(scores, -1, out=scores))
            o.copy_(scores @ c)
        ctx.save_for_backward(q, k, v, out, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """The gradients of q, k and v."""
        q, k, v, out, *saved = ctx.saved_tensors
        grads = tuple(map(_empty_like, (q, k, v)))
        # The gradient of softmax is p (g - sum p g). The sum equals that of grad * out (Dao et al. 2022, appendix B.4).
        sums = (grad * out).sum(3, keepdim=True)
        chunks = _chunks((q, k, v, grad, sums, *grads), per_head=saved[0].ndim == 2)
        for (a, b, c, g, total, grad_q, grad_k, grad_v), p in zip(chunks, saved, strict=True):
            grad_v.copy_(p.mT @ g)
            scores = (g @ c.mT).sub_(total).mul_(p)
            grad_q.copy_((scores @ b).div_(math.sqrt(q.shape[3])))
            grad_k.copy_(scores.mT @ (a / math.sqrt(q.shape[3])))
        return grads


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, chunks: int) -> Tensor:
    """Attention with the queries in equal chunks, which the fused kernel computes as separate clips."""
    b, _, n, _ = q.shape
    rows = -(-n // chunks)
    q = F.pad(q, (0, 0, 0, rows * chunks - n)).unflatten(2, (chunks, rows)).transpose(1, 2).flatten(0, 1)
    k, v = (x[:, None].expand(b, chunks, *x.shape[1:]).flatten(0, 1) for x in (k, v))
    out: Tensor = F.scaled_dot_product_attention(q, k, v)
    out = out.unflatten(0, (b, chunks)).transpose(1, 2).flatten(2, 3)[:, :, :n]
    return out


def _chunks(tensors: Iterable[Tensor], *, per_head: bool) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of one product: each head of each clip, or the complete (B, heads, N, d) tensors."""
    return zip(*([head for clip in x for head in clip] if per_head else [x] for x in tensors), strict=True)


def _empty_like(x: Tensor) -> Tensor:
    """An uninitialized (B, heads, N, d) tensor with the memory order (B, N, heads, d) of the attention layer."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class ChunkedMSE(torch.autograd.Function):
    """Mean of ``(a - b)^2``, in chunks of rows on a CPU, so that only the gradient needs an array of the size of `a`.

    2,416 tokens of 1,536 values take 11 ms forward and backward. `torch.nn.functional.mse_loss` takes 26 ms, because it
    allocates arrays of that size.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """(N, P) twice -> scalar."""
        ctx.save_for_backward(a, b)
        rows = MSE_CHUNK_ROWS if a.device.type == "cpu" else a.shape[0]  # each chunk costs a kernel launch on a GPU
        squares = [
            torch.linalg.vector_norm(p - q, dim=1).square_() for p, q in zip(a.split(rows), b.split(rows), strict=True)
        ]
        return torch.cat(squares).mean() / a.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The gradient of `a`. `b` gets none."""
        a, b = ctx.saved_tensors
        return torch.sub(a, b).mul_(grad * (2 / a.numel())), None
