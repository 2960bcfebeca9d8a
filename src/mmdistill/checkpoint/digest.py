"""Digests of weights."""

import hashlib

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, dtypes and values of a module's state."""
    digest = hashlib.sha256(str(getattr(module, "geometry", "")).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
