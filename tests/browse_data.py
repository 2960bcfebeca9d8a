"""Tiny data with an evaluation of random features, for the tests of ``mmdistill browse``."""

import json
from pathlib import Path

import numpy as np

from mmdistill.builders import make_clip_index
from mmdistill.config import DistillConfig
from mmdistill.config.compose import load_config
from mmdistill.evaluation.report.write import to_json
from mmdistill.fewshot.features import Features, save_features
from mmdistill.fewshot.protocol import Protocol, run_protocol
from tests.tiny_data import overrides


def browse_config(data: Path, *more: str) -> DistillConfig:
    """The config of the tiny data in `data`."""
    own = [o for o in overrides(data) if not o.startswith("trainer")]
    return load_config(DistillConfig, "config_mmdistill", [*own, *more, "train=False", "test=False"])


def write_evaluation(config: DistillConfig, folder: Path) -> Path:
    """Evaluate random features of the clips of `config`; the path of the JSON, which names their file."""
    index = make_clip_index(config.data_module, training=False)
    labels = np.array([clip.label for clip in index.clips])
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 1, 8))[labels] + 2 * rng.normal(size=(len(labels), 1, 8))).astype(np.float32)
    ids, groups = (tuple(getattr(clip, name) for clip in index.clips) for name in ("id", "group"))
    features = Features(x, labels, ids, groups, index.classes, {"network": "student_rgb"})
    protocol = Protocol((3,), (2,), q_sample=3, episodes=20, classifiers=("centroid",))
    results = run_protocol([features], protocol, show_progress=False)
    files = [str(save_features(features, folder / "features.safetensors"))]
    path = folder / "fewshot.json"
    path.write_text(json.dumps(to_json(results, extra={"files": files})))
    return path
