"""Softmax attention, and timm's attention layer for any head width and dtype."""

import torch
import torch.nn.functional as F
from timm.models.beit import Attention as TimmAttention
from torch import Tensor

from mmdistill.ops.cpu import attention_with_gradient


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, equation 1). (B, heads, N or M, d) -> (B, heads, N, d).

    It is torch's fused kernel, except for training on a CPU in float32 or float64, see `mmdistill.ops.cpu`.
    """
    if q.device.type == "cpu" and q.dtype.itemsize >= 4 and q.requires_grad:
        return attention_with_gradient(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


class Attention(TimmAttention):
    """timm's attention layer for any head width and any dtype.

    timm 1.0.31 reshapes the output to the width, which fails if heads * head_dim differs from it. Its `k_bias` is a
    buffer, which stays in fp32 when DeepSpeed casts the parameters to bf16.
    """

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, last: int | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D). With `last`, only the queries of the last tokens are computed: (B, last, D)."""
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
        projected: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return projected
