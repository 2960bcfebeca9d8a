"""Digests of weights."""

import hashlib
import json
from dataclasses import asdict, is_dataclass

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, dtypes and values of a module's state."""
    config = getattr(module, "config", None)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode() if is_dataclass(config) else b"")
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
