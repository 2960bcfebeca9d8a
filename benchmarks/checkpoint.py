"""Speed and memory of the checkpoint layer against plain ``torch.save`` and ``torch.load`` of the same tensors.

    python benchmarks/checkpoint.py [--megabytes 400] [--folder DIR] [--repeats 8] [--json]

Saving includes checksums, fsync and rename; the plain save also ends with an fsync. Loading includes the comparison of
every checksum; the files are in the page cache. Each measurement runs in its own process, which also reports its peak
memory above the start. Each repeat runs all measurements and starts with another one. The table shows medians, because
the best of a few repeats is not reliable on a shared disk whose speed varies by a factor of four; it is also shown.
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


def make_tensors(megabytes: int) -> dict[str, torch.Tensor]:
    """Large matrices and small vectors, like those of a ViT."""
    generator = torch.Generator().manual_seed(0)
    state, block, index = {}, 1024 * 4096 * 4 + 4096 * 4, 0
    while index * block < megabytes * 10**6:
        state[f"encoder.blocks.{index}.mlp.fc1.weight"] = torch.randn(4096, 1024, generator=generator)
        state[f"encoder.blocks.{index}.mlp.fc1.bias"] = torch.randn(4096, generator=generator)
        index += 1
    return state


def save_with_fsync(state: dict[str, torch.Tensor], path: Path) -> None:
    """Call ``torch.save`` and fsync."""
    torch.save({"state_dict": state}, path)
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def copy_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy every byte once, as a load into a module does; mapped tensors are read only then."""
    return {name: tensor.clone() for name, tensor in state.items()}


def load_and_copy(path: Path) -> None:
    """Call ``torch.load`` and copy the tensors, as a load into a module does."""
    copy_tensors(torch.load(path, weights_only=True)["state_dict"])


MEASUREMENTS = {
    "save torch.save + fsync": lambda s, d: save_with_fsync(s, d / "plain.pt"),
    "save .ckpt": lambda s, d: save_torch({"state_dict": s}, d / "ours.ckpt"),
    "save DeepSpeed directory": lambda s, d: write_deepspeed(s, d / "ours", {"kind": "weights"}),
    "save .safetensors": lambda s, d: save_safetensors(s, d / "ours.safetensors", {"kind": "weights"}),
    "load torch.load": lambda _, d: torch.load(d / "plain.pt", weights_only=True),
    "load .ckpt for resuming": lambda _, d: load_torch(d / "ours.ckpt"),
    "load torch.load + copy": lambda _, d: load_and_copy(d / "plain.pt"),
    "load .ckpt weights + copy": lambda _, d: copy_tensors(read_checkpoint(d / "ours.ckpt").state_dict),
    "load directory weights + copy": lambda _, d: copy_tensors(read_checkpoint(d / "ours").state_dict),
    "load .safetensors + copy": lambda _, d: copy_tensors(read_checkpoint(d / "ours.safetensors").state_dict),
}
BASE = {"save": "save torch.save + fsync", "load": "load torch.load", "copy": "load torch.load + copy"}


class PeakMemory:
    """Samples the peak of the process's anonymous memory in MB; pages of mapped files are not counted."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = self.current()
        self.running = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def current(self) -> float:
        """Return RssAnon of this process in MB."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1e3
        return 0.0

    def watch(self) -> None:
        """Sample until the block ends."""
        while self.running:
            self.peak = max(self.peak, self.current())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()
        self.peak = max(self.peak, self.current())


def measure(name: str, folder: Path, megabytes: int) -> dict[str, float]:
    """Run one measurement in this process."""
    state = make_tensors(megabytes) if name.startswith("save") else {}
    with PeakMemory() as memory:
        start = time.perf_counter()
        result = MEASUREMENTS[name](state, folder)
        seconds = time.perf_counter() - start
    del result
    return {"seconds": seconds, "peak_mb": memory.peak - memory.before}


def run_in_process(name: str, folder: Path, megabytes: int) -> dict[str, float]:
    """Run one measurement in its own process."""
    command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--megabytes", str(megabytes)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def clear_folder(folder: Path) -> None:
    """Delete the content of a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def order_of_runs(names: list[str], repeats: int) -> list[str]:
    """All names in each repeat, starting with another one each time, so that a disk which slows down favors none."""
    return [names[(repeat + index) % len(names)] for repeat in range(repeats) for index in range(len(names))]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--folder", help="folder for the files (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, Path(args.folder), args.megabytes)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    saves = [name for name in MEASUREMENTS if name.startswith("save")]
    loads = [name for name in MEASUREMENTS if name not in saves]
    repeats: dict[str, list[dict[str, float]]] = {name: [] for name in MEASUREMENTS}
    try:
        for name in order_of_runs(saves, args.repeats):
            repeats[name].append(run_in_process(name, folder, args.megabytes))
            clear_folder(folder)  # so that the page cache is the same for each save
        state = make_tensors(args.megabytes)
        for name in saves:
            MEASUREMENTS[name](state, folder)
        for name in order_of_runs(loads, args.repeats):
            repeats[name].append(run_in_process(name, folder, args.megabytes))
    finally:
        shutil.rmtree(folder)
    results: dict[str, dict[str, float]] = {}
    for name, measurements in repeats.items():
        seconds = [measurement["seconds"] for measurement in measurements]
        results[name] = {"seconds": statistics.median(seconds), "best_seconds": min(seconds)}
    for name, row in results.items():
        row["peak_mb"] = max(measurement["peak_mb"] for measurement in repeats[name])
        base = BASE["copy" if name.endswith("copy") else name.split()[0]]
        row["mb_per_s"] = args.megabytes / row["seconds"]
        row["share_of_torch"] = results[base]["seconds"] / row["seconds"]
        row["memory_share"] = row["peak_mb"] / args.megabytes
    if args.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{args.megabytes} MB, torch {torch.__version__}, {os.cpu_count()} cores, medians of {args.repeats}")
    print(f"{'':<32}{'s':>8}{'best':>8}{'MB/s':>8}{'of torch':>10}{'peak/size':>11}")
    for name, row in results.items():
        share, memory = row["share_of_torch"], row["memory_share"]
        times = f"{row['seconds']:>8.3f}{row['best_seconds']:>8.3f}{row['mb_per_s']:>8.0f}"
        print(f"{name:<32}{times}{share:>10.0%}{memory:>11.2f}")


if __name__ == "__main__":
    main()
