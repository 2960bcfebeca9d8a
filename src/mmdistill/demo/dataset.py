"""The demo dataset: rendered tennis rallies in exactly the layout of the real data, made on first use.

``python -m mmdistill.demo.dataset ROOT``. Under ROOT:

- ``vid_frames_224/{video}/{frame:06d}.jpg``: 64 x 68 px by default; the folder has the real data's name
- ``tennis_flows/{video}/pair_{frame:05d}.npy``: DIS flow frame -> frame + 1, int8 with a scale (`flowfile`), computed
  from the rendered pictures before JPEG
- ``skeletons/f3set-tennis/{video}.pkl``: the true joints of the near (0) and far (1) player, COCO-17
- ``train.json``, ``val.json`` (no shared player, no shared court), ``unlabel.json`` (the training rallies)
- ``demo.json``: the parameters, written last

A stroke's class is (type, side, technique, direction) of its F3Set label; see `demo_strokes.STROKES`. Every random
number is a function of `seed` and the rally, so that rallies can be made in any order, in any process, again.
"""

import argparse
import fcntl
import io
import json
import multiprocessing
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdistill.console import progress as show_progress
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.demo import render
from mmdistill.demo.scene import (
    DEFAULT_NUISANCE,
    SPLITS,
    DemoError,
    DemoParameters,
    RallyPlan,
    RallyScene,
    build_scene,
    plan_rallies,
    render_rally,
)
from mmdistill.demo.strokes import STROKES
from mmdistill.files import atomic_write_bytes

FORMAT = 5  # raised when the same parameters give other bytes
FRAME_DIR, FLOW_DIR, SKELETON_DIR = "vid_frames_224", "tennis_flows", "skeletons/f3set-tennis"
FPS = 11.0


def rally_record(plan: RallyPlan, parameters: DemoParameters) -> dict[str, Any]:
    """The rally as F3Set writes it. Court side, approach and outcome are drawn at random: they are not the class."""
    rng = parameters.rng("labels", plan.number)
    height, width = parameters.frame_size
    events = []
    for k, (stroke, frame) in enumerate(zip(plan.strokes, plan.frames, strict=True)):
        kind, side, technique, direction = STROKES[stroke].fields
        court = rng.choice(["deuce", "ad"] if kind == "serve" else ["deuce", "middle", "ad"])
        approach = "approach" if rng.uniform() < 0.15 else "-"
        outcome = "in" if k + 1 < len(plan.strokes) else str(rng.choice(["in", "winner", "forced-err", "unforced-err"]))
        label = f"near_{court}_{kind}_{side}_{technique}_{direction}_{approach}_{outcome}"
        events.append({"frame": frame, "label": label, "outcome": outcome})
    people = {}
    for where, player in (("far", plan.opponent), ("near", plan.player)):
        people |= {
            f"{where}_name": f"Demo Player {player:02d}",
            f"{where}_hand": "RH",
            f"{where}_set": 0,
            f"{where}_game": 0,
            f"{where}_point": 0,
        }
    head = {"fps": FPS, "height": height, "width": width, "num_frames": plan.num_frames, "video": plan.video}
    return {**head, **people, "events": events}


def _replace_folder(temporary: Path, target: Path) -> None:
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)


def make_rally(root: Path, plan: RallyPlan, parameters: DemoParameters) -> str:
    """Render one rally and put its frames, flow and skeletons in place; the skeleton file, written last, closes it.

    Returns the video's name.
    """
    cv2.setNumThreads(1)
    scene = build_scene(plan, parameters)
    folders = [root / kind / f".tmp-{plan.video}" for kind in (FRAME_DIR, FLOW_DIR)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, scene.look.jpeg, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    previous: np.ndarray | None = None
    for t, picture in enumerate(render_rally(scene, plan, parameters)):
        done, data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), quality)
        if not done:
            raise DemoError(f"{plan.video}: OpenCV could not encode frame {t} as JPEG")
        (folders[0] / f"{t:06d}.jpg").write_bytes(data.tobytes())
        if previous is not None:
            write_flow(folders[1] / f"pair_{t - 1:05d}.npy", render.dense_flow(previous, picture), dtype="int8")
        previous = picture
    for folder, kind in zip(folders, (FRAME_DIR, FLOW_DIR), strict=True):
        _replace_folder(folder, root / kind / plan.video)
    (root / SKELETON_DIR).mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(root / SKELETON_DIR / f"{plan.video}.pkl", skeleton_bytes(scene, plan, parameters))
    return plan.video


def joint_scores(keypoints: np.ndarray) -> np.ndarray:
    """Scores of true joints, float32 (2, T, 17): 1 for the near player, for the far one his height over the near one's.

    A detector is surer of larger people. The far player's own strokes are not the labelled ones.
    """
    heights = np.ptp(keypoints[..., 1], axis=2).mean(axis=1)  # (2,) px
    scores = np.ones(keypoints.shape[:3], np.float32)
    scores[1] = min(1.0, heights[1] / heights[0])
    return scores


def skeleton_bytes(scene: RallyScene, plan: RallyPlan, parameters: DemoParameters) -> bytes:
    """The skeleton pickle: plain containers and NumPy arrays."""
    buffer = io.BytesIO()
    pickle.dump(
        {
            "keypoint": scene.keypoints,
            "keypoint_score": joint_scores(scene.keypoints),
            "total_frames": plan.num_frames,
            "img_shape": tuple(parameters.frame_size),
        },
        buffer,
        protocol=4,
    )
    return buffer.getvalue()


def is_complete(root: Path, plan: RallyPlan) -> bool:
    """Whether all files of a rally are there (they are counted, not opened)."""
    if not (root / SKELETON_DIR / f"{plan.video}.pkl").is_file():
        return False
    for kind, suffix, expected in ((FRAME_DIR, ".jpg", plan.num_frames), (FLOW_DIR, ".npy", plan.num_frames - 1)):
        folder = root / kind / plan.video
        if not folder.is_dir() or sum(e.name.endswith(suffix) for e in os.scandir(folder)) != expected:
            return False
    return True


@contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Others who want to make the same dataset wait until this one is done."""
    with (root / ".demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_parameters(root: Path, wanted: dict[str, Any]) -> None:
    for name in ("demo.json", "demo.partial.json"):
        path = root / name
        if not path.is_file():
            continue
        found = json.loads(path.read_text(encoding="utf-8"))["parameters"]
        other = {k: (found.get(k), wanted.get(k)) for k in {*found, *wanted} if found.get(k) != wanted.get(k)}
        if other:
            text = ", ".join(f"{key} is {a}, wanted {b}" for key, (a, b) in sorted(other.items()))
            raise DemoError(f"{path}: a demo dataset with other parameters ({text}); use another folder or delete it")


def _render_all(root: Path, plans: list[RallyPlan], parameters: DemoParameters, workers: int, progress: bool) -> None:
    with show_progress("demo data, rallies", len(plans), enabled=progress, ends=True) as advance:
        if workers == 1:
            for plan in plans:
                make_rally(root, plan, parameters)
                advance(1)
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(make_rally, root, plan, parameters) for plan in plans]
            for job in as_completed(jobs):
                job.result()
                advance(1)


def make_demo(
    root: Path,
    *,
    seed: int = 0,
    nuisance: float = DEFAULT_NUISANCE,
    frame_size: tuple[int, int] = (64, 68),
    strokes_per_class: tuple[int, int] = (24, 24),
    strokes_per_rally: int = 6,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Make the demo dataset under `root`, or what is missing of it; a finished one is left alone.

    Args:
        root: folder, created if needed.
        seed, nuisance, frame_size, strokes_per_class, strokes_per_rally: see `DemoParameters`.
        workers: processes; None takes one per core, 1 stays in this process.
        progress: show a bar, or plain lines without a terminal.

    Raises:
        DemoError: where `root` holds a demo dataset made with other parameters, or a parameter makes no sense.
    """
    parameters = DemoParameters(seed, nuisance, tuple(frame_size), tuple(strokes_per_class), strokes_per_rally)
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    # Through JSON, so that tuples compare with what is read back.
    wanted = json.loads(json.dumps({"format": FORMAT, **asdict(parameters)}))
    plans = plan_rallies(parameters)
    with _only_one(root):
        _check_parameters(root, wanted)
        missing = [plan for plan in plans if not is_complete(root, plan)]
        if not missing and (root / "demo.json").is_file():
            return
        atomic_write_bytes(root / "demo.partial.json", json.dumps({"parameters": wanted}).encode())
        (root / "demo.json").unlink(missing_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _render_all(root, missing, parameters, min(workers or cores, max(len(missing), 1)), progress)
        records = {split: [rally_record(p, parameters) for p in plans if p.split == split] for split in SPLITS}
        for name, split in (("train", "train"), ("val", "val"), ("unlabel", "train")):
            atomic_write_bytes(root / f"{name}.json", json.dumps(records[split], indent=2).encode())
        atomic_write_bytes(root / "demo.json", json.dumps({"parameters": wanted}, indent=2).encode())
        (root / "demo.partial.json").unlink()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the demo dataset (rendered tennis rallies).")
    parser.add_argument("root", type=Path, help="folder to make it in")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nuisance", type=float, default=DEFAULT_NUISANCE, help="0 none, 1 strong")
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one per core")
    options = parser.parse_args()
    try:
        make_demo(options.root, seed=options.seed, nuisance=options.nuisance, workers=options.workers)
    except DemoError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
