"""Which kernel attention uses, and timm's layer for any head width."""

import pytest
import torch

from mmdistill.models import attention as module
from mmdistill.models.attention import Attention, attention


def test_cpu_kernel_is_used_for_training_in_full_precision_only(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []
    kernel = module.attention_with_gradient
    monkeypatch.setattr(module, "attention_with_gradient", lambda q, k, v: dtypes.append(q.dtype) or kernel(q, k, v))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=dtype, requires_grad=True)
        attention(q, k, v)
        attention(q.detach(), k.detach(), v.detach())
    assert dtypes == [torch.float32, torch.float64]


def test_last_tokens_equal_those_of_the_full_output() -> None:
    torch.manual_seed(0)
    layer = Attention(12, 2, qkv_bias=True, attn_head_dim=5).double()
    for bias in (layer.q_bias, layer.v_bias):
        torch.nn.init.normal_(bias)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    for last in (1, 3, 7):
        torch.testing.assert_close(layer(x, last=last), layer(x)[:, -last:], atol=1e-12, rtol=1e-10)
