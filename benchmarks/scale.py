"""Cost of large data sets and of many runs: memory, index and coverage of two million files, search of checkpoints.

    python benchmarks/scale.py windows [--workers 8] [--start-method fork]
    python benchmarks/scale.py files ANNOTATIONS...
    python benchmarks/scale.py pack VIDEO
    python benchmarks/scale.py runs

`windows` prints the bytes of a million windows and the memory of loader workers (proportional set size, Linux). `files`
writes the frame folders of F3Set annotation files to a temporary folder, with empty files after the first frame, and
measures the index and the coverage (`mmdistill check-data --every` a large number). `pack` prepares a video with and
without `--pack` and prints files and bytes per hour of video, and the time per clip. `runs` writes 10,000 pretraining
runs to a temporary folder and prints the CPU time of `mmdistill find-checkpoints`.
"""

import argparse
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np

from mmdistill.config import PretrainConfig, to_plain
from mmdistill.config.compose import load_config
from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.clips import ClipIndex, ClipSpec, build_index
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, CropSpec, init_worker
from mmdistill.data.masking import MaskSpec
from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import FLOW_DTYPES, write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.modalities import BUILTIN_MODALITIES
from mmdistill.prepare.coverage import check_all
from mmdistill.prepare.outputs import FLOW_DIR, FRAME_DIR
from mmdistill.prepare.pipeline import Settings, prepare_video

NUM_RUNS = 10_000
NUM_RALLIES, RALLY_FRAMES = 4000, 266  # 250 windows each
NUM_BATCHES = 4000  # of 32 windows in random order, which touch every page of the index
SIZE = (16, 24)


class ZeroReader(Reader):
    """Reads no file, so that the memory is that of the clips."""

    name = "rgb"

    def read(self, video: str, frames: Sequence[int]) -> np.ndarray:
        """Zeros."""
        return np.zeros((len(frames), *SIZE, 3), np.uint8)

    def missing_frames(self, video: str, frames: Sequence[int]) -> list[int]:
        """No file."""
        return []

    def files(self, video: str, frames: Sequence[int]) -> list[str]:
        """No file."""
        return []


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["windows", "files", "pack", "runs"])
    parser.add_argument("paths", type=Path, nargs="*", metavar="ANNOTATIONS | VIDEO")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--start-method", choices=multiprocessing.get_all_start_methods(), default="fork")
    options = parser.parse_args()
    if options.part == "windows":
        index = _measure_index()
        _measure_workers(index, options)
    elif options.part == "files":
        _measure_files(options.paths)
    elif options.part == "runs":
        _measure_runs()
    else:
        _measure_pack(options.paths[0])


def _measure_index() -> ClipIndex:
    rallies = [Rally(f"2019-Open-SF-Player_One-Player_Two_{i}", RALLY_FRAMES, 25.0, ()) for i in range(NUM_RALLIES)]
    tracemalloc.start()
    index = build_index(rallies, ClipSpec("windows", 16, stride=1))
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    count = len(index.clips)
    print(f"{count} windows: {current / count:.0f} bytes each, {peak / count:.0f} at the peak of the construction")
    start = time.perf_counter()
    build_index(rallies, ClipSpec("windows", 16, stride=1))
    print(f"construction: {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    size = len(pickle.dumps(index))
    print(f"pickled: {size / count:.0f} bytes per window, {time.perf_counter() - start:.2f} s")
    return index


def _measure_workers(index: ClipIndex, options: argparse.Namespace) -> None:
    """Private memory of the workers after an epoch, with all windows and with the windows of the first rally."""
    few = build_index([Rally("one", RALLY_FRAMES, 25.0, ())], ClipSpec("windows", 16, stride=1))
    for name, clips in (("few windows", few), ("all windows", index)):
        dataset = ClipDataset(clips, {"rgb": ZeroReader()}, CropSpec(SIZE, SIZE), MaskSpec((8, 1, 1)))
        loader = ClipLoader(
            dataset,
            batch_sampler=EpochBatchSampler(len(dataset), batch_size=32, seed=0),
            num_workers=options.workers,
            worker_init_fn=init_worker,
            multiprocessing_context=options.start_method,
            persistent_workers=True,
        )
        start = time.perf_counter()
        batches = iter(loader)
        num_batches = sum(1 for _ in zip(batches, range(NUM_BATCHES), strict=False))
        seconds = time.perf_counter() - start
        sizes = [_memory(child.pid) for child in multiprocessing.active_children() if child.pid is not None]
        pss, private = (sum(size[key] for size in sizes) / max(len(sizes), 1) / 1e6 for key in ("Pss", "Private"))
        print(
            f"{name}: {len(sizes)} workers ({options.start_method}), {pss:.0f} MB PSS and {private:.0f} MB private "
            f"memory each after {num_batches} batches in {seconds:.1f} s"
        )
        del batches, loader


def _memory(pid: int) -> Counter[str]:
    """PSS and private bytes of a process."""
    sizes: Counter[str] = Counter()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        if key == "Pss:" or key.startswith("Private"):
            sizes[key.rstrip(":").split("_")[0]] += 1024 * int(value)
    return sizes


def _measure_files(annotations: Sequence[Path]) -> None:
    rallies = [rally for path in annotations for rally in load_f3set(path)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        num_files = _write_folders(Path(folder), rallies)
        print(f"wrote {num_files} files of {len(rallies)} rallies in {time.perf_counter() - start:.0f} s")
        readers = {
            "rgb": RgbReader(Path(folder, "rgb"), frame_size=SIZE),
            "flow": FlowReader(Path(folder, "flow"), frame_size=SIZE),
        }
        start = time.perf_counter()
        index = build_index(rallies, ClipSpec("windows", 16, stride=1))
        indexed = time.perf_counter()
        print(f"index of {len(index.clips)} windows: {indexed - start:.2f} s")
        crop, mask = CropSpec(SIZE, SIZE), MaskSpec((8, 1, 1))
        kept = len(ClipDataset(index, readers, crop, mask, on_missing="skip"))
        print(f"{kept} windows without a missing file (on_missing=skip): {time.perf_counter() - indexed:.2f} s")
        counts: Counter[str] = Counter()
        for name in ("listdir", "scandir", "stat"):
            original = getattr(os, name)
            setattr(os, name, lambda *args, f=original, n=name, **kw: (counts.update([n]), f(*args, **kw))[1])
        start = time.perf_counter()
        report = check_all(rallies, readers, workers=1, every=10**9)
        num_folders = 2 * len(rallies)
        print(f"coverage: {time.perf_counter() - start:.2f} s; calls for {num_folders} folders: {dict(counts)}")
        assert report["complete"], report["messages"][:3]


def _measure_pack(video: Path) -> None:
    for dtype in FLOW_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            _measure_pack_of_dtype(video, Path(folder), dtype)


def _measure_pack_of_dtype(video: Path, root: Path, dtype: str) -> None:
    readers: dict[str, list[Reader]] = {"rgb": [], "flow": []}
    for pack in (False, True):
        out = root / str(pack)
        record = prepare_video("v", video, out, Settings(flow_dtype=dtype, pack=pack)).record
        assert record is not None
        size = (record["stored_size"][0], record["stored_size"][1])
        readers["rgb"].append(RgbReader(out / FRAME_DIR, frame_size=size))
        readers["flow"].append(FlowReader(out / FLOW_DIR, frame_size=size))
        hours = record["num_frames"] / record["fps"] / 3600
        for name in (FRAME_DIR, FLOW_DIR):
            files = list((out / name).rglob("*.*"))
            disk = sum(file.stat().st_blocks * 512 for file in files)
            num_bytes = sum(file.stat().st_size for file in files)
            per_hour = "1 file" if pack else f"{len(files) / hours:.0f} files"
            print(
                f"{dtype}, pack={pack}, {name}: {per_hour}, {num_bytes / hours / 1e9:.2f} GB, {disk / hours / 1e9:.2f} "
                f"GB on disk per hour at {record['fps']:.0f} fps"
            )
    for name, both in readers.items():
        times: list[list[float]] = [[], []]
        starts = np.random.default_rng(0).integers(0, record["num_frames"] - 17, 200).tolist()
        for start in starts:
            arrays = []
            for reader, seconds in zip(both, times, strict=True):
                begin = time.process_time()
                arrays.append(reader.read("v", range(start, start + 16)))
                seconds.append(1000 * (time.process_time() - begin))
            assert np.array_equal(*arrays)
        separate, packed = map(np.median, times)
        print(f"{dtype}, {name}: {separate:.2f} ms per clip of 16 separate files, {packed:.2f} ms packed")


def _measure_runs() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _write_runs(Path(folder))
        for repeat in range(3):
            before = os.times()
            subprocess.run(
                [sys.executable, "-m", "mmdistill", "find-checkpoints", folder], check=True, stdout=subprocess.DEVNULL
            )
            after = os.times()
            seconds = after.children_user + after.children_system - before.children_user - before.children_system
            print(f"find-checkpoints, {NUM_RUNS} runs, repeat {repeat}: {seconds:.2f} s of CPU")


def _write_runs(root: Path) -> None:
    """Pretraining runs with the complete ``run.json`` and one checkpoint, whose files have no content."""
    names = list(BUILTIN_MODALITIES)
    configs = {name: to_plain(load_config(PretrainConfig, "config_pretrain", [f"modality={name}"])) for name in names}
    files = ["checkpoint/mp_rank_00_model_states.pt", "meta.json", "state.pt"]
    for number in range(NUM_RUNS):
        name, started = names[number % 3], datetime.fromtimestamp(1_750_000_000 + 100 * number, UTC)
        run = root / started.strftime("%Y-%m-%d/%H-%M-%S") / f"pretrain_{name}"
        checkpoint = run / "checkpoints" / "epoch=49-loss=0.6095"
        (checkpoint / "checkpoint").mkdir(parents=True)
        for file in files:
            (checkpoint / file).touch()
        manifest = {"kind": "pretrain", "modality": name, "epoch": 49, "loss": 0.6095}
        sizes = {file: {"bytes": 0} for file in files}
        (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": sizes}))
        record = {"started": started.isoformat(), "command": ["mmdistill pretrain"], "config": configs[name]}
        (run / "run.json").write_text(json.dumps([record]))


def _write_folders(root: Path, rallies: Sequence[Rally]) -> int:
    """Folders with one valid file for the first frame and empty files for the others. Returns the number of files."""
    image, flow = root / "image.jpg", root / "flow.npy"
    cv2.imwrite(str(image), np.zeros((*SIZE, 3), np.uint8))
    write_flow(flow, np.zeros((2, *SIZE), np.float32))
    num_files = 0
    for rally in rallies:
        for source, kind, pattern, count in (
            (image, "rgb", "{:06d}.jpg", rally.num_frames),
            (flow, "flow", "pair_{:05d}.npy", rally.num_frames - 1),
        ):
            folder = root / kind / rally.video
            folder.mkdir(parents=True)
            os.link(source, folder / pattern.format(0))
            for frame in range(1, count):
                os.mknod(folder / pattern.format(frame))
            num_files += count
    return num_files


if __name__ == "__main__":
    main()
