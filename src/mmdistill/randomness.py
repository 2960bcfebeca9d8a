"""Seeded randomness: the only module that turns a seed and a key into random numbers.

One rule derives every stream: the first 16 bytes of the SHA-256 of ``repr(key)``, read as a little-endian integer,
seed the generator. A key is a tuple such as ``(seed, epoch, clip id, "mask")``. A draw depends on its key alone,
not on the machine, the process or earlier draws, and a resumed run needs no generator state.
"""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*key: int | str) -> int:
    """A 128-bit seed that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")


def seeded_rng(*key: int | str) -> np.random.Generator:
    """A NumPy generator that depends on `key` alone."""
    return np.random.default_rng(derive_seed(*key))


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch for one training step, so that dropout and stochastic depth depend on the step alone."""
    torch.manual_seed(derive_seed(seed, epoch, batch, rank) % 2**63)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
