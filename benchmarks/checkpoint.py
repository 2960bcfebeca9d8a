"""Speed and memory of the checkpoint layer against plain ``torch.save`` and ``torch.load`` of the same tensors.

    python benchmarks/checkpoint.py [--megabytes 400] [--folder DIR] [--repeats 8] [--json]

Saving includes checksums, fsync and rename; the plain save is followed by an fsync too, so that both end with the
bytes on the disk. Loading includes the comparison of every checksum; the files are in the page cache. Each measurement
runs in a process of its own, which also reports its peak memory above the start. All take turns in each repeat, each
time another one first, and the medians count: on a shared disk whose speed moves fourfold the best of a few is luck. It
is printed beside them.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from mmdistill.checkpoint import load_torch, read_checkpoint, save_safetensors, save_torch
from mmdistill.checkpoint.convert import write_deepspeed


def tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """A ViT's mixture of large matrices and small vectors."""
    generator = torch.Generator().manual_seed(0)
    state, block, index = {}, 1024 * 4096 * 4 + 4096 * 4, 0
    while index * block < megabytes * 10**6:
        state[f"encoder.blocks.{index}.mlp.fc1.weight"] = torch.randn(4096, 1024, generator=generator)
        state[f"encoder.blocks.{index}.mlp.fc1.bias"] = torch.randn(4096, generator=generator)
        index += 1
    return state


def plain_save(state: dict[str, torch.Tensor], path: Path) -> None:
    """``torch.save`` and fsync."""
    torch.save({"state_dict": state}, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def touch(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every byte copied once, as into a module: mapped tensors are not read before that."""
    return {name: tensor.clone() for name, tensor in state.items()}


def copied_load(path: Path) -> None:
    """``torch.load`` and the copy into a module."""
    touch(torch.load(path, weights_only=True)["state_dict"])


WAYS = {
    "save torch.save + fsync": lambda s, d: plain_save(s, d / "plain.pt"),
    "save .ckpt": lambda s, d: save_torch({"state_dict": s}, d / "ours.ckpt"),
    "save DeepSpeed directory": lambda s, d: write_deepspeed(s, d / "ours", {"kind": "weights"}),
    "save .safetensors": lambda s, d: save_safetensors(s, d / "ours.safetensors", {"kind": "weights"}),
    "load torch.load": lambda _, d: torch.load(d / "plain.pt", weights_only=True),
    "load .ckpt for resuming": lambda _, d: load_torch(d / "ours.ckpt"),
    "load torch.load + copy": lambda _, d: copied_load(d / "plain.pt"),
    "load .ckpt weights + copy": lambda _, d: touch(read_checkpoint(d / "ours.ckpt").state_dict),
    "load directory weights + copy": lambda _, d: touch(read_checkpoint(d / "ours").state_dict),
    "load .safetensors + copy": lambda _, d: touch(read_checkpoint(d / "ours.safetensors").state_dict),
}
BASE = {"save": "save torch.save + fsync", "load": "load torch.load", "copy": "load torch.load + copy"}


class Peak:
    """The most memory of its own that this process holds, in MB, sampled; pages of mapped files can be dropped at any
    time."""

    def __enter__(self) -> "Peak":
        self.before = self.most = self.now()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def now(self) -> float:
        """RssAnon of this process."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1e3
        return 0.0

    def watch(self) -> None:
        """Until the block ends."""
        while self.running:
            self.most = max(self.most, self.now())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.most = max(self.most, self.now())


def measure(name: str, folder: Path, megabytes: int) -> dict[str, float]:
    """One measurement in this process."""
    state = tensors(megabytes) if name.startswith("save") else {}
    with Peak() as peak:
        start = time.perf_counter()
        result = WAYS[name](state, folder)
        seconds = time.perf_counter() - start
    del result
    return {"seconds": seconds, "peak_mb": peak.most - peak.before}


def run(name: str, folder: Path, megabytes: int) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--megabytes", str(megabytes)]
    told: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told


def clear(folder: Path) -> None:
    """Empty a folder."""
    for old in folder.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def turns(names: list[str], repeats: int) -> list[str]:
    """All names in each repeat, each time another one first: a disk that slows down after a burst favours none."""
    return [names[(repeat + place) % len(names)] for repeat in range(repeats) for place in range(len(names))]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, Path(args.folder), args.megabytes)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    saves = [name for name in WAYS if name.startswith("save")]
    loads = [name for name in WAYS if name not in saves]
    repeats: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    try:
        for name in turns(saves, args.repeats):
            repeats[name].append(run(name, folder, args.megabytes))
            clear(folder)  # each save finds the page cache as the one before did
        state = tensors(args.megabytes)
        for name in saves:
            WAYS[name](state, folder)
        for name in turns(loads, args.repeats):
            repeats[name].append(run(name, folder, args.megabytes))
    finally:
        shutil.rmtree(folder)
    results: dict[str, dict[str, float]] = {}
    for name, all_told in repeats.items():
        seconds = [one["seconds"] for one in all_told]
        results[name] = {"seconds": statistics.median(seconds), "best_seconds": min(seconds)}
    for name, told in results.items():
        told["peak_mb"] = max(one["peak_mb"] for one in repeats[name])
        base = BASE["copy" if name.endswith("copy") else name.split()[0]]
        told["mb_per_s"] = args.megabytes / told["seconds"]
        told["share_of_torch"] = results[base]["seconds"] / told["seconds"]
        told["memory_share"] = told["peak_mb"] / args.megabytes
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{args.megabytes} MB, torch {torch.__version__}, {os.cpu_count()} cores, medians of {args.repeats}")
    print(f"{'':<32}{'s':>8}{'best':>8}{'MB/s':>8}{'of torch':>10}{'peak/size':>11}")
    for name, told in results.items():
        share, memory = told["share_of_torch"], told["memory_share"]
        times = f"{told['seconds']:>8.3f}{told['best_seconds']:>8.3f}{told['mb_per_s']:>8.0f}"
        print(f"{name:<32}{times}{share:>10.0%}{memory:>11.2f}")


if __name__ == "__main__":
    main()
