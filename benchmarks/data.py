"""Cost of data loading: ms per clip and part on one core, rendering of heat-maps, clips per second by workers.

    python benchmarks/data.py [--workers 0 1 2]
    python benchmarks/data.py --wait     # data wait of both trainings: full size (ViT-S), 1 worker, batch 1

It writes one rally of 64 frames of 224 x 398 px to a temporary folder: JPEG frames, float32 flow, a skeleton pickle.
"""

import argparse
import csv
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader, default_collate

from mmdistill.checkpoint import save_torch
from mmdistill.config import to_plain
from mmdistill.data.annotations.base import Rally
from mmdistill.data.clips import ClipSpec, build_index
from mmdistill.data.dataset import ClipDataset, CropSpec, init_worker
from mmdistill.data.masking import MaskSpec
from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.distributed.device import tune_malloc
from mmdistill.modalities import BUILTIN_MODALITIES, get_modality, preprocess_clips
from mmdistill.models.videomae import Encoder, EncoderConfig

ROOT = Path(__file__).resolve().parents[1]
SIZE, CROP, FRAMES = (224, 398), (224, 384), 64


def main() -> None:
    """Write the data, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args()
    init_worker(0)
    tune_malloc()  # as in a training, whose workers inherit it
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _write_data(root)
        if options.wait:
            _measure_data_wait(root)
            return
        dataset = _dataset(root)
        _measure_parts(root, dataset, options.repeats)
        for workers in options.workers:
            _measure_throughput(dataset, workers)


def _write_data(root: Path) -> None:
    rng = np.random.default_rng(0)
    (root / "rgb/r").mkdir(parents=True)
    (root / "flow/r").mkdir(parents=True)
    scene = cv2.GaussianBlur(rng.integers(0, 255, (SIZE[0], SIZE[1] + FRAMES, 3), np.uint8), (0, 0), 3)
    scene = cv2.normalize(scene, None, 0, 255, cv2.NORM_MINMAX)
    for k in range(FRAMES):
        image = cv2.add(scene[:, k : k + SIZE[1]], rng.integers(0, 6, (*SIZE, 3), np.uint8))
        cv2.imwrite(str(root / f"rgb/r/{k:06d}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 95])
        flow = rng.normal(0, 2, (2, *SIZE)).astype(np.float32)
        write_flow(root / f"flow/r/pair_{k:05d}.npy", flow, dtype="float32")
    entry = {
        "keypoint": rng.uniform(0, 200, (2, 400, 17, 2)).astype(np.float32),
        "keypoint_score": np.ones((2, 400, 17), np.float32),
        "total_frames": 400,
        "img_shape": (720, 1280),
    }
    (root / "r.pkl").write_bytes(pickle.dumps(entry))


def _readers(root: Path) -> dict[str, Reader]:
    return {
        "rgb": RgbReader(root / "rgb", frame_size=SIZE),
        "flow": FlowReader(root / "flow", frame_size=SIZE),
        "skeleton": SkeletonReader(root, frame_size=SIZE),
    }


def _dataset(root: Path) -> ClipDataset:
    index = build_index([Rally("r", FRAMES, 25.0, ())], ClipSpec("windows", 16, stride=1))
    mask = MaskSpec((8, 14, 24), mask_ratio=0.9)
    return ClipDataset(index, _readers(root), CropSpec(SIZE, CROP, augment=True), mask)


def _time(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """(median, fastest) CPU time of a call in ms, which is independent of other load."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times), min(times)


def _measure_parts(root: Path, dataset: ClipDataset, repeats: int) -> None:
    readers, frames = _readers(root), range(8, 24)
    calls: dict[str, Callable[[], object]] = {
        "rgb, 16 JPEGs": lambda: readers["rgb"].read("r", frames),
        "flow, 16 float32 files": lambda: readers["flow"].read("r", frames),
        "skeleton, cached": lambda: readers["skeleton"].read("r", frames),
        "skeleton, file read": lambda: SkeletonReader(root, frame_size=SIZE).read("r", frames),
        "sample, three modalities": lambda: dataset[(1, 5)],
    }
    batch = default_collate([dataset[(1, 5)]])
    calls["heat-maps 17 x 16 x 56 x 96"] = lambda: preprocess_clips(
        batch["skeleton"], batch["crop_box"], get_modality("skeleton").spec(), (CROP[0] // 4, CROP[1] // 4)
    )
    print(f"{'part':32} {'median':>8} {'fastest':>8}  ms of CPU per clip, one core")
    for name, call in calls.items():
        median, fastest = _time(call, repeats)
        print(f"{name:32} {median:8.2f} {fastest:8.2f}")
    size = sum(value.numel() * value.element_size() for value in batch.values())
    print(f"{'sent by a worker':32} {size / 1e6:8.2f} MB")


def _measure_throughput(dataset: ClipDataset, workers: int) -> None:
    sampler = EpochBatchSampler(len(dataset), batch_size=4, seed=0)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        worker_init_fn=init_worker,
        persistent_workers=workers > 0,
    )
    list(loader)  # start the workers
    start, clips = time.perf_counter(), 0
    for epoch in range(2):
        sampler.set_state(epoch, 0)
        clips += sum(len(batch["index"]) for batch in loader)
    print(f"{workers} workers: {clips / (time.perf_counter() - start):.1f} clips/s")


def _measure_data_wait(root: Path) -> None:
    """Run both trainings for two epochs of 13 steps. The first epoch starts the worker."""
    rally = {"video": "r", "fps": 25.0, "height": SIZE[0], "width": SIZE[1], "num_frames": FRAMES, "events": []}
    (root / "unlabel.json").write_text(json.dumps([rally]))
    for modality in BUILTIN_MODALITIES:
        spec = get_modality(modality).spec()
        height, width, patch = CROP[0] // spec.input_stride, CROP[1] // spec.input_stride, 16 // spec.input_stride
        encoder_config = EncoderConfig(spec.channels, 16, height, width, patch, 2, 384, 12, 6, 64, 1536)
        state = {f"encoder.{k}": v for k, v in Encoder(encoder_config).state_dict().items()}
        meta = {"kind": "pretrain", "modality": modality, "encoders": {"encoder": to_plain(encoder_config)}}
        save_torch({"state_dict": state, "mmdistill": meta}, root / f"{modality}.ckpt")
    teachers = ",".join(f"{m}:{root / m}.ckpt" for m in BUILTIN_MODALITIES)
    common = [
        *(
            f"data_module.{k}={v}"
            for k, v in {"target_data_dir": root, "frames_dir": "rgb", "flow_dir": "flow"}.items()
        ),
        *("data_module.skeleton_dir='.'", "data_module.window_stride=4", "batch_size=1", "num_workers=1"),
        *("trainer.epochs=2", "logger=[csv]"),
    ]
    runs = {
        "pretrain rgb": ["pretrain_main.py", "--config-name=config_pretrain_tennis", "modality=rgb"],
        "pretrain flow": ["pretrain_main.py", "--config-name=config_pretrain_tennis", "modality=flow"],
        "distill": [
            *("lit_main_mmdistill.py", "--config-name=config_mmdistill_tennis", "test=False"),
            f"trainer.ckpt_path={{{teachers}}}",
        ],
    }
    print(f"{os.cpu_count()} cores; {'':20} seconds per step   data wait in %, by epoch")
    for name, command in runs.items():
        run = root / name.replace(" ", "_")
        done = subprocess.run(
            [sys.executable, *command, *common, f"hydra.run.dir={run}"], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        with (run / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        steps, waits = ([float(row[name]) for row in rows] for name in ("clips_per_s", "data_wait_percent"))
        print(
            f"{name:31} {', '.join(f'{1 / s:.2f}' for s in steps):18} {', '.join(f'{w:.1f}' for w in waits)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
