"""Digests of weights."""

import hashlib
import json
from dataclasses import asdict, is_dataclass

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """sha256 of a module's config (the values of its fields) and of the names, dtypes, shapes and values of its state.

    Class names are not included, so that renaming a class does not change the digest.
    """
    config = getattr(module, "config", None)
    digest = hashlib.sha256()
    if is_dataclass(config) and not isinstance(config, type):
        digest.update(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
