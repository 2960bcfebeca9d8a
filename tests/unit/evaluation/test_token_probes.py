"""The tokens of the attentive probes: order, file, disk space."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill.data.clips import Clip, ClipIndex
from mmdistill.evaluation import token_probes
from mmdistill.evaluation.networks import Network
from mmdistill.evaluation.token_probes import run_token_probes
from mmdistill.fewshot.errors import FeatureError, FewshotError
from mmdistill.modalities import get_modality, preprocess_clips
from mmdistill.models.videomae import Encoder, EncoderConfig

INDEX = ClipIndex(tuple(Clip(f"v{i}#0", f"v{i}", tuple(range(4)), i % 2, f"v{i}") for i in range(6)), ("a", "b"))
CLIPS = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (6, 4, 16, 24, 3), dtype=np.uint8))
BOX = torch.tensor([0.0, 0.0, 16.0, 24.0, 0.0])
SPECS = {"rgb": get_modality("rgb").spec()}


def batches() -> list[dict[str, torch.Tensor]]:
    """In another order than that of the index."""
    rows = [torch.tensor([4, 1, 5, 0]), torch.tensor([2, 3])]
    return [{"rgb": CLIPS[r], "crop_box": BOX.expand(len(r), 5), "index": r} for r in rows]


def run(*encoders: Encoder) -> dict[str, dict[str, Any]]:
    networks = [Network(f"net{i}", encoder, "rgb") for i, encoder in enumerate(encoders)]
    return run_token_probes(networks, SPECS, batches, INDEX, seed=3, device=torch.device("cpu"), precision="32")


def make_encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(EncoderConfig(3, 4, 16, 24, 8, 2, dim=16, depth=1, heads=2, head_dim=8, mlp_dim=32))


def test_each_network_is_probed_with_the_tokens_of_all_clips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    received: list[tuple[np.ndarray, list[int], list[str]]] = []

    def probe(
        tokens: np.ndarray, labels: np.ndarray, *, groups: list[str], seed: int, device: object
    ) -> dict[str, Any]:
        assert list(tmp_path.rglob("tokens.npy"))
        received.append((np.array(tokens), labels.tolist(), groups))
        return {"attentive_top1": 0.5, "seed": seed}

    monkeypatch.setattr(token_probes, "probe_tokens", probe)
    encoders = [make_encoder(0), make_encoder(1)]
    found = run(*encoders)
    assert {name: (r["attentive_top1"], r["seed"]) for name, r in found.items()} == {"net0": (0.5, 3), "net1": (0.5, 3)}
    assert all(r["attentive_encode_seconds"] > 0 for r in found.values())
    assert not list(tmp_path.rglob("tokens.npy"))
    x = preprocess_clips(CLIPS, BOX.expand(6, 5), SPECS["rgb"], (16, 24))
    for encoder, (tokens, labels, groups) in zip(encoders, received, strict=True):
        with torch.no_grad():
            np.testing.assert_allclose(tokens, encoder(x).numpy(), atol=3e-3, rtol=2e-3)  # float16
        assert (tokens.shape, labels, groups[5]) == ((6, 12, 16), [0, 1] * 3, "v5")


def test_too_little_disk_space_and_invalid_tokens_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = make_encoder(0)
    torch.nn.init.constant_(broken.norm.bias, float("nan"))
    with pytest.raises(FeatureError, match="net0: NaN or infinite tokens"):
        run(broken)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 990, 10))  # type: ignore[attr-defined]
    with pytest.raises(FewshotError, match=r"the tokens of net0 need 0\.0 GB, and .* has 0\.0 GB; set TMPDIR"):
        run(make_encoder(0))
