"""Measure the duration of the few-shot evaluation on this machine.

python benchmarks/fewshot.py

Episodes: 600 of 5-way 5-shot with 15 queries on 5,000 features of width 384, two mask views. Encoding: ViT-S on visible
tokens, its arithmetic counted and compared with the fp32 matrix product that this machine reaches.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mmdistill.data.clips import Clip
from mmdistill.fewshot.encode import ClipEncoder, EncodingJob, EvalMasks
from mmdistill.fewshot.episodes import Episodes, EpisodeSpec, sample_episodes
from mmdistill.fewshot.scores import evaluate_episodes
from mmdistill.modalities import get_modality
from mmdistill.models.flops import encoder_flops
from mmdistill.models.videomae import Encoder, EncoderConfig
from mmdistill.training.matrix_rate import DTYPES

VIT_S = EncoderConfig(3, 16, 224, 384, 16, 2, dim=384, depth=12, heads=6, head_dim=64, mlp_dim=1536)
LIMITS = {"logistic": 8.0, "centroid": 1.0}


def clips(count: int = 5000, classes: int = 100, width: int = 384, views: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Features around class means, noisy enough that classifiers differ. float32 (clips, views, width), labels"""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    x = 0.15 * rng.normal(size=(classes, width))[labels][:, None] + rng.normal(size=(count, views, width))
    return x.astype(np.float32), labels


def time_classifiers(features: np.ndarray, episodes: Episodes, workers: int | None) -> dict[str, dict[str, float]]:
    """Seconds and accuracy of each classifier; the time includes the start of the worker processes."""
    out = {}
    for name in ("logistic", "centroid", "centroid_euclidean", "knn"):
        start = time.perf_counter()
        scores = evaluate_episodes(features, episodes, name, workers=workers)
        seconds = time.perf_counter() - start
        limit = f"  (limit {LIMITS[name]:.0f} s)" if name in LIMITS else ""
        print(f"{name:20} {seconds:6.2f} s  accuracy {100 * scores.accuracy.mean():.2f} %{limit}", flush=True)
        out[name] = {"seconds": seconds, "accuracy": float(scores.accuracy.mean())}
    return out


def gemm_rate(g: EncoderConfig, tokens: int, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Best rate (flop/s) in `dtype` of a linear layer of this encoder's widest shape on all of a batch's tokens."""
    layer, x = nn.Linear(g.dim, g.mlp_dim, dtype=dtype), torch.randn(tokens, g.dim, dtype=dtype)
    best, end = 0.0, time.perf_counter() + seconds
    with torch.inference_mode():
        while time.perf_counter() < end:
            start = time.perf_counter()
            layer(x)
            best = max(best, 2 * tokens * g.dim * g.mlp_dim / (time.perf_counter() - start))
    return best


def time_encoding(batch: int, ratio: float, repeats: int, precision: str) -> dict[str, float]:
    """Rate of the encoding of masked clips, including preprocessing, and that of a matrix product."""
    encode = ClipEncoder(Encoder(VIT_S), get_modality("rgb").spec(), precision=precision)
    eval_masks = EvalMasks(2, ratio)
    job = EncodingJob("benchmark", encode, VIT_S.grid, eval_masks)
    crop_box = torch.tensor([0.0, 7.0, 224.0, 384.0, 0.0]).expand(batch, 5)
    rgb = torch.randint(0, 255, (batch, 16, 224, 398, 3), dtype=torch.uint8)
    owners = [Clip(str(i), "", (), -1, "") for i in range(batch)]
    masks = [eval_masks.visible_tokens(owners, v, VIT_S.grid) for v in range(eval_masks.n_masks)]
    tokens = 0 if masks[0] is None else masks[0].shape[1]
    rate, best = 0.0, float("inf")
    with torch.inference_mode():
        for _ in range(repeats):  # alternating, so that other load on the machine affects both
            rate = max(rate, gemm_rate(VIT_S, batch * tokens, DTYPES[precision]))
            start = time.perf_counter()
            fresh = {"rgb": rgb.clone(), "crop_box": crop_box}  # a new batch: preprocessed once for both views
            for mask in masks:
                job.encode(fresh, mask)
            best = min(best, time.perf_counter() - start)
    flop = encoder_flops(VIT_S, tokens) * batch * eval_masks.n_masks
    print(f"{precision:4} matrix product   {rate / 1e9:6.0f} GFLOP/s, {batch * tokens} x {VIT_S.dim} x {VIT_S.mlp_dim}")
    each = f"{flop / batch / eval_masks.n_masks / 1e9:.1f} GFLOP per clip and view of {tokens} visible tokens"
    print(f"ViT-S encoding        {flop / best / 1e9:6.0f} GFLOP/s, {100 * flop / best / rate:.0f} % of it; {each}")
    print(f"                      {batch * eval_masks.n_masks / best:6.2f} clips x views per second")
    return {"gemm_gflops": rate / 1e9, "encoding_gflops": flop / best / 1e9, "share": flop / best / rate}


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--workers", type=int, help="processes of the logistic regression; default: all processors")
    parser.add_argument("--batch", type=int, default=4, help="clips per batch of the encoding")
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of the encoding")
    parser.add_argument("--no-encoding", action="store_true", help="time the episodes only")
    parser.add_argument("--json", type=Path, metavar="OUT")
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    features, labels = clips()
    start = time.perf_counter()
    episodes = sample_episodes(labels, EpisodeSpec(5, 5), episodes=args.episodes, seed=0)
    print(f"{'drawing episodes':20} {time.perf_counter() - start:6.2f} s  {args.episodes} episodes, 5-way 5-shot q 15")
    result: dict[str, object] = {"heads": time_classifiers(features, episodes, args.workers)}
    if not args.no_encoding:
        result["encoding"] = time_encoding(args.batch, args.mask_ratio, args.repeats, args.precision)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
