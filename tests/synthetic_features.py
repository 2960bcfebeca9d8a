"""Features of 8 classes x 30 clips around random class means, and two clips without a label."""

import numpy as np

from mmdistill.fewshot.features import Features

NAMES = tuple(f"near_ad_stroke_fh_gs_{c}" for c in ("CC", "DL", "<b>&'\"", "网球", "IO", "T", "B", "W"))


def make_features(
    network: str, noise: float, *, input_mode: str = "whole clips", views: int = 1, width: int = 12
) -> Features:
    """Features of one network. More noise gives a worse network."""
    labels = np.concatenate((np.repeat(np.arange(8), 30), [-1, -1]))
    means = np.random.default_rng(1).normal(size=(8, width))
    rng = np.random.default_rng(len(network) + int(10 * noise))
    x = means[labels][:, None] + noise * rng.normal(size=(len(labels), views, width))
    ids = tuple(f"clip{i}" for i in range(len(labels)))
    groups = tuple(f"rally{i // 3}" for i in range(len(labels)))
    info = {"network": network, "input_mode": input_mode, "checkpoint": f"/runs/{network}.ckpt", "seconds": 1.25}
    return Features(x.astype(np.float32), labels, ids, groups, NAMES, info)
