"""Features of 8 classes x 30 clips around random class means, and two clips without a label."""

import numpy as np

from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, Results, run_protocol

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


def make_results() -> Results:
    """Results of two networks, one of them in two input modes, and of a random network; with probes."""
    networks = [
        make_features("student_rgb", 1.5, views=2, input_mode="2 tube masks"),
        make_features("student_rgb", 1.5),
        make_features("<script>alert(1)</script>", 3.0),
        make_features("random", 9.0),
    ]
    protocol = Protocol(
        k_shot=(1, 5), q_sample=6, episodes=40, classifiers=("centroid", "knn"), probe=True, disjoint="video"
    )
    return run_protocol(networks, protocol, show_progress=False)


def read_gray_frame(clip: int) -> np.ndarray:
    """A uniform frame, uint8 (112, 199, 3)."""
    return np.full((112, 199, 3), clip % 250, np.uint8)
