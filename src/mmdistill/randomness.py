"""Seeded randomness. No other module creates or seeds a random generator.

New code uses `seeded_rng`: the first 16 bytes of the SHA-256 of ``repr(key)``, read as a little-endian integer, seed
the generator. A key is a tuple such as ``(seed, epoch, clip id, "mask")``. A draw depends on its key alone, not on the
machine, the process or earlier draws, so a resumed run needs no generator state.

`integer_rng` and `text_rng` have other derivations. They are kept because the demo dataset, the episodes and the
evaluation masks, and thus the numbers in docs/results.md, depend on them.
"""

import hashlib
import random

import numpy as np


def derive_seed(*key: int | str) -> int:
    """A 128-bit seed that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little")


def seeded_rng(*key: int | str) -> np.random.Generator:
    """A NumPy generator that depends on `key` alone."""
    return np.random.default_rng(derive_seed(*key))


def integer_rng(*key: int) -> np.random.Generator:
    """A NumPy generator from `numpy.random.SeedSequence` of non-negative integers: demo dataset, episodes, plots."""
    return np.random.default_rng(key)


def text_rng(text: str) -> np.random.Generator:
    """A NumPy generator from `numpy.random.SeedSequence` of the SHA-256 of a text: evaluation masks."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))


def seed_torch(seed: int) -> None:
    """Seed torch's global generators, before weights are initialized."""
    import torch  # takes seconds, and commands that use NumPy only should start fast

    torch.manual_seed(seed)


def seed_step(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed torch for one training step, so that dropout and stochastic depth depend on the step alone."""
    seed_torch(derive_seed(seed, epoch, batch, rank) % 2**63)


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    seed_torch(seed)
