"""Attentive probe: a classifier of all labels that chooses which tokens of a clip count.

Source: V-JEPA (Bardes et al. 2024, arXiv 2404.08471), section 4: a learned query attends to the tokens of a frozen
encoder; the result is added to the query, and passes through an MLP and a linear layer.

Shapes: N clips, B batch, L tokens, D width, H heads, d = D / H, C classes.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mmdistill.fewshot.episodes import IntArray
from mmdistill.fewshot.probe import split_by_group
from mmdistill.randomness import seed_torch, seeded_rng

HEAD_WIDTH = 64
BATCH_CLIPS = 32  # clips whose tokens are in memory at once
EPOCHS = 40
MIN_STEPS = 1000  # more epochs with few clips
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01


class AttentiveProbe(nn.Module):
    """One layer of cross-attention with a learned query, an MLP, and a linear layer.

    With a single query, the keys and values of all tokens need not be computed: the score of a token is its product
    with ``W_k^T q``, and the values are projected after the weighted mean. The bias of the keys has no effect.
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        heads = dim // HEAD_WIDTH if dim % HEAD_WIDTH == 0 else 1
        self.query = nn.Parameter(torch.zeros(heads, dim // heads))
        self.key = nn.Parameter(torch.zeros(heads, dim // heads, dim))
        self.value = nn.Parameter(torch.zeros(heads, dim // heads, dim))
        self.value_bias = nn.Parameter(torch.zeros(dim))
        for weight in (self.query, self.key, self.value):
            nn.init.trunc_normal_(weight, std=dim**-0.5)
        self.norm_tokens, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.project = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) -> (B, C)."""
        tokens = self.norm_tokens(tokens)
        keys = torch.einsum("hk,hkd->hd", self.query, self.key) / self.query.shape[1] ** 0.5
        attention = (tokens @ keys.T).softmax(dim=1)  # (B, L, H)
        context = attention.mT @ tokens  # (B, H, D)
        values = torch.einsum("bhd,hkd->bhk", context, self.value).flatten(1) + self.value_bias
        x = self.query.flatten() + self.project(values)
        classes: Tensor = self.head(x + self.mlp(self.norm_mlp(x)))
        return classes


def probe_tokens(
    tokens: NDArray[np.float16],
    labels: IntArray,
    *,
    groups: Sequence[str],
    seed: int,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train an `AttentiveProbe` on 3/4 of the videos, and test it on the rest: the split of `probe_full_label_set`.

    Tokens are scaled to zero mean and unit variance per dimension (statistics of the training clips). The training has
    `EPOCHS` epochs, or more if these have fewer than `MIN_STEPS` steps, with AdamW and a cosine schedule. The tokens of
    `BATCH_CLIPS` clips are in memory at once, as float32, so `tokens` may be a memory-mapped file.

    `tokens` are (N, L, D), `labels` int64 (N,) with -1 for none, `groups` the names of the videos.

    Returns:
        `attentive_top1`, `attentive_macro` (mean over classes) and `attentive_train_top1` (on the training clips):
        fractions; `attentive_train_seconds`.
    """
    from sklearn.preprocessing import StandardScaler  # not at the start of an evaluation

    start = time.perf_counter()
    train, test = split_by_group(labels, groups, seed=seed)
    values, targets = np.unique(labels[train], return_inverse=True)
    batches = -(-len(train) // BATCH_CLIPS)
    epochs = max(EPOCHS, -(-MIN_STEPS // batches))
    scaler = StandardScaler()
    for rows in np.array_split(train, batches):
        scaler.partial_fit(np.asarray(tokens[rows], dtype=np.float64).reshape(-1, tokens.shape[2]))
    mean, scale = (torch.from_numpy(x).float().to(device) for x in (scaler.mean_, scaler.scale_))

    def load(rows: IntArray) -> Tensor:
        return (torch.from_numpy(np.asarray(tokens[rows], dtype=np.float32)).to(device) - mean) / scale

    def predict(rows: IntArray) -> IntArray:
        parts = np.array_split(rows, -(-len(rows) // BATCH_CLIPS))
        found: IntArray = values[np.concatenate([probe(load(part)).argmax(dim=1).cpu().numpy() for part in parts])]
        return found

    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        probe = AttentiveProbe(tokens.shape[2], len(values)).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        order = seeded_rng(seed, epoch, "attentive probe").permutation(len(train))
        for rows in np.array_split(order, batches):
            rows = np.sort(rows)
            loss = F.cross_entropy(probe(load(train[rows])), torch.from_numpy(targets[rows]).to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        correct, truth = predict(test) == labels[test], labels[test]
        train_correct = predict(train) == labels[train]
    return {
        "attentive_top1": float(correct.mean()),
        "attentive_macro": float(np.mean([correct[truth == v].mean() for v in np.unique(truth)])),
        "attentive_train_top1": float(train_correct.mean()),
        "attentive_train_seconds": time.perf_counter() - start,
    }
