"""Time and memory of pretraining against tokens, batch size, processes and ZeRO stage, with fitted exponents.

    python benchmarks/scaling.py [--steps 6] [--precision 32|bf16] [--plot FILE] [--only tokens batch ...]

Each row is one run of `pretrain_main.py` with ViT-S on frames that the script writes. It has two epochs, and the second
one is measured. The time of a step excludes the wait for data. The memory is the peak of the largest process; *above*
is the part above that of a training of a tiny model. An exponent is the slope of the least-squares line through
(log size, log value). Tokens and batch sizes use all cores in one process. Processes and ZeRO stages use one core per
process and gloo.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from mmdistill.randomness import seeded_rng

ROOT = Path(__file__).resolve().parents[1]
FRAMES, TUBELET, PATCH = 16, 2, 16
SIZES = ((64, 128), (112, 192), (160, 288), (224, 384))
BATCHES = (1, 2, 4, 8)
TINY = (
    "model.dim=32",
    "model.depth=1",
    "model.heads=2",
    "model.decoder_dim=16",
    "model.decoder_depth=1",
    "model.decoder_heads=1",
)


@dataclass(frozen=True)
class Case:
    """One training. `size` is (height, width) in px, `batch` is clips per process."""

    size: tuple[int, int] = (112, 192)
    batch: int = 2
    processes: int = 1
    cores: int = 0  # per process; 0: all
    stage: int | None = None  # of ZeRO; None: the default of `processes`
    model: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a clip."""
        return FRAMES // TUBELET * (self.size[0] // PATCH) * (self.size[1] // PATCH)


@dataclass(frozen=True)
class Cost:
    """Seconds per step, and GB of the largest process."""

    seconds: float
    memory: float


def cases() -> dict[str, list[Case]]:
    """The varied quantity -> its cases."""
    one, two = Case(cores=1), Case(processes=2, cores=1)
    return {
        "tokens": [Case(size=size) for size in SIZES],
        "batch": [Case(batch=batch) for batch in BATCHES],
        "processes": [one, two],
        "ZeRO stage": [replace(two, stage=stage) for stage in range(4)],
    }


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The a of value = c * size ** a."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def write_frames(root: Path, size: tuple[int, int], count: int) -> None:
    """`count` JPEG frames of this size, if they are not there."""
    folder = root / f"{size[0]}x{size[1]}" / "r"
    folder.mkdir(parents=True, exist_ok=True)
    rng = seeded_rng(0, *size)
    for k in range(len(list(folder.iterdir())), count):
        image = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), size[::-1])
        cv2.imwrite(str(folder / f"{k:06d}.jpg"), image)


def train(root: Path, case: Case, steps: int, precision: str) -> Cost:
    """Run one training and read its metrics.

    Raises:
        SystemExit: the training failed.
    """
    clips = steps * case.batch * case.processes
    count = FRAMES + clips  # one window per frame; the last frame has no flow
    write_frames(root, case.size, count)
    rally = {"video": "r", "fps": 25.0, "num_frames": count, "events": []}
    rally |= {"height": case.size[0], "width": case.size[1]}
    (root / "unlabel.json").write_text(json.dumps([rally]))
    run = Path(tempfile.mkdtemp(dir=root))
    size = f"[{case.size[0]},{case.size[1]}]"
    data = {
        "target_data_dir": root,
        "frames_dir": f"{case.size[0]}x{case.size[1]}",
        "frame_size": size,
        "crop_size": size,
        "window_stride": 1,
        "unlabel_json_path": "unlabel.json",
    }
    command = [
        *(sys.executable, "pretrain_main.py", "--config-name=config_pretrain_tennis", "modality=rgb", *case.model),
        *(f"data_module.{key}={value}" for key, value in data.items()),
        *(f"batch_size={case.batch}", "num_workers=0", "accelerator=cpu", f"devices={case.processes}"),
        *("trainer.epochs=2", "trainer.warmup_epochs=0", "logger=csv", f"precision={precision}"),
        *([] if case.stage is None else [f"strategy=deepspeed_stage_{case.stage}"]),
        f"hydra.run.dir={run / 'run'}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(case.cores or os.cpu_count())}
    with (run / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # with its children
    if status:
        raise SystemExit((run / "log.txt").read_text()[-2000:])
    with (run / "run" / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    step = case.batch * case.processes / float(last["clips_per_s"])
    return Cost(step * (1 - float(last["data_wait_percent"]) / 100), usage.ru_maxrss * 1024 / 1e9)


def plot(found: dict[str, list[tuple[float, Cost]]], path: Path) -> None:
    """Seconds per step against tokens and batch size, with the fitted lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    names = [name for name in ("tokens", "batch") if name in found]
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        sizes, seconds = [size for size, _ in found[name]], [cost.seconds for _, cost in found[name]]
        a, log_c = np.polyfit(np.log(sizes), np.log(seconds), 1)
        axes.loglog(sizes, np.exp(log_c) * np.array(sizes) ** a, color="0.6", label=f"exponent {a:.2f}")
        axes.loglog(sizes, seconds, "o", color="C0")
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel({"tokens": "tokens of a clip, batch size 2", "batch": "batch size, 672 tokens"}[name])
        axes.set_ylabel("seconds per step")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps per epoch")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(cases()), default=list(cases()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        baseline = train(root, Case(size=SIZES[0], batch=1, model=TINY), options.steps, options.precision).memory
        print(f"precision {options.precision}; memory of a tiny model: {baseline:.2f} GB")
        heads = ("tokens", "batch", "processes", "stage", "s/step", "GB", "above")
        print(f"{'varied':12}" + "".join(f"{head:>10}" for head in heads))
        found: dict[str, list[tuple[float, Cost]]] = {}
        for name in options.only:
            for case in cases()[name]:
                cost = train(root, case, options.steps, options.precision)
                cells = (case.tokens, case.batch, case.processes, "" if case.stage is None else case.stage)
                numbers = (cost.seconds, cost.memory, cost.memory - baseline)
                row = "".join(f"{cell:>10}" for cell in cells) + "".join(f"{number:10.3f}" for number in numbers)
                print(f"{name:12}{row}", flush=True)
                size = {"tokens": case.tokens, "batch": case.batch, "processes": case.processes}.get(name, 0)
                found.setdefault(name, []).append((size, cost))
    for name in ("tokens", "batch"):
        if name in found:
            sizes, costs = zip(*found[name], strict=True)
            time = fit_exponent(sizes, [cost.seconds for cost in costs])
            memory = fit_exponent(sizes, [cost.memory - baseline for cost in costs])
            print(f"exponent of {name}: time {time:.2f}, memory above {memory:.2f}")
    if "processes" in found:
        (_, one), (_, two) = found["processes"]
        print(f"efficiency of two processes: {one.seconds / two.seconds:.2f}")  # each has its own clips
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
