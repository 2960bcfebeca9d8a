"""The demo dataset: rendered tennis rallies in the layout of the real data, created on first use.

`make_demo` writes to its folder:

- ``vid_frames_224/{video}/{frame:06d}.jpg``: 64 x 68 px by default; the folder name is that of the real data
- ``tennis_flows/{video}/pair_{frame:05d}.npy``: DIS flow from frame to frame + 1, int8 with a scale (`write_flow`),
  computed from the rendered images before JPEG compression
- ``skeletons/f3set-tennis/{video}.pkl``: exact COCO-17 joints of the near (0) and far (1) player
- ``train.json`` and ``val.json``, which share no player and no court; ``unlabel.json``: the training rallies
- ``demo.json``: the parameters, written last

The class of a stroke is (type, side, technique, direction) of its F3Set label; see `demo.strokes.STROKES`. Every random
number depends only on `seed` and the rally, so rallies can be rendered in any order and in any process.
"""

import errno
import json
import pickle
import shutil
from concurrent.futures import as_completed
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock, SoftFileLock

from mmdistill.console import progress as show_progress
from mmdistill.data.cores import available_cores
from mmdistill.data.process_pool import process_pool
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.demo import render
from mmdistill.demo.scene import (
    SPLITS,
    DemoError,
    DemoParameters,
    RallyPlan,
    build_scene,
    plan_rallies,
    render_rally,
)
from mmdistill.demo.strokes import STROKES
from mmdistill.files import atomic_write_bytes, rename_directory, write_errors

FORMAT = 6  # increase it when the same parameters produce different bytes
FRAME_DIR, FLOW_DIR, SKELETON_DIR = "vid_frames_224", "tennis_flows", "skeletons/f3set-tennis"
ANNOTATION_FILES = {"train.json": "train", "val.json": "val", "unlabel.json": "train"}  # file -> split
FPS = 11.0


def rally_record(plan: RallyPlan, parameters: DemoParameters) -> dict[str, Any]:
    """The F3Set annotation of a rally. Court side, approach and outcome are random; no class depends on them."""
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
    record: dict[str, Any] = {"fps": FPS, "height": height, "width": width}
    record |= {"num_frames": plan.num_frames, "video": plan.video}
    for side, player in (("far", plan.opponent), ("near", plan.player)):
        record |= {f"{side}_name": f"Demo Player {player:02d}", f"{side}_hand": "RH"}
        record |= {f"{side}_{score}": 0 for score in ("set", "game", "point")}
    return {**record, "events": events}


def write_rally(root: Path, plan: RallyPlan, parameters: DemoParameters) -> str:
    """Render one rally and write its frames, flow and skeletons. The skeleton file is written last.

    The joint scores are 1 for the near player, and the ratio of far to near height for the far player: a detector has
    higher scores on larger people, and the labeled strokes are those of the near player. Returns the name of the video.
    """
    cv2.setNumThreads(1)
    scene = build_scene(plan, parameters)
    folders = [root / kind / f".tmp-{plan.video}" for kind in (FRAME_DIR, FLOW_DIR)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    quality = [cv2.IMWRITE_JPEG_QUALITY, scene.appearance.jpeg, cv2.IMWRITE_JPEG_OPTIMIZE, 1]
    previous: np.ndarray | None = None
    for t, image in enumerate(render_rally(scene, plan, parameters)):
        success, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
        if not success:
            raise DemoError(f"{plan.video}: OpenCV cannot encode frame {t} as JPEG")
        (folders[0] / f"{t:06d}.jpg").write_bytes(data.tobytes())
        if previous is not None:
            write_flow(folders[1] / f"pair_{t - 1:05d}.npy", render.compute_flow(previous, image), dtype="int8")
        previous = image
    for folder, kind in zip(folders, (FRAME_DIR, FLOW_DIR), strict=True):
        shutil.rmtree(root / kind / plan.video, ignore_errors=True)
        rename_directory(folder, root / kind / plan.video)
    heights = np.ptp(scene.keypoints[..., 1], axis=2).mean(axis=1)  # (2,) px
    scores = np.ones(scene.keypoints.shape[:3], np.float32)
    scores[1] = min(1.0, heights[1] / heights[0])
    content = {
        "keypoint": scene.keypoints,
        "keypoint_score": scores,
        "total_frames": plan.num_frames,
        "img_shape": tuple(parameters.frame_size),
    }
    atomic_write_bytes(root / SKELETON_DIR / f"{plan.video}.pkl", pickle.dumps(content, protocol=4))
    return plan.video


def is_complete(root: Path, plan: RallyPlan) -> bool:
    """Whether all files of a rally exist. They are counted, not opened."""
    frames, flows = (root / FRAME_DIR / plan.video).glob("*.jpg"), (root / FLOW_DIR / plan.video).glob("*.npy")
    expected = plan.num_frames, plan.num_frames - 1
    return (root / SKELETON_DIR / f"{plan.video}.pkl").is_file() and (len(list(frames)), len(list(flows))) == expected


def _check_parameters(root: Path, requested: dict[str, Any]) -> None:
    records = [path for path in (root / "demo.json", root / "demo.partial.json") if path.is_file()]
    others = [name for name in ANNOTATION_FILES if not records and (root / name).exists()]
    if others:
        raise DemoError(
            f"{root}: contains {', '.join(others)} of another dataset, which the demo data would replace; set "
            "dataset=NAME for this dataset, or another folder for the demo data (data_module.target_data_dir)"
        )
    for path in records:
        found = json.loads(path.read_bytes())["parameters"]
        keys = sorted(key for key in {*found, *requested} if found.get(key) != requested.get(key))
        if keys:
            text = ", ".join(f"{key} is {found.get(key)}, requested {requested.get(key)}" for key in keys)
            raise DemoError(
                f"{path}: contains a demo dataset with other parameters ({text}); use another folder or delete it"
            )


def _render_all(root: Path, plans: list[RallyPlan], parameters: DemoParameters, workers: int, progress: bool) -> None:
    with show_progress("demo data, rallies", len(plans), enabled=progress, show_ends=True) as advance:
        if workers == 1:
            for plan in plans:
                write_rally(root, plan, parameters)
                advance(1)
            return
        with process_pool(workers) as pool:
            for job in as_completed([pool.submit(write_rally, root, plan, parameters) for plan in plans]):
                job.result()
                advance(1)


def _acquire_lock(root: Path) -> AbstractContextManager[object]:
    """Wait for the lock of a dataset; on a file system without locks it is a file that is created exclusively."""
    with write_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        try:
            return FileLock(root / ".demo.lock").acquire()
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        return SoftFileLock(root / ".demo.softlock").acquire()


def make_demo(root: Path, parameters: DemoParameters, *, workers: int | None = None, progress: bool = True) -> None:
    """Create the demo dataset in `root`. Only missing rallies are rendered; a complete dataset is not changed.

    `workers` is the number of processes; None: one per core; 1: no other process. `progress` shows a progress bar, or
    plain lines without a terminal.

    Raises:
        DemoError: `root` contains a demo dataset with other parameters, or annotation files of another dataset.
    """
    # A round trip through JSON turns tuples into lists, as in the file.
    requested = json.loads(json.dumps({"format": FORMAT, **asdict(parameters)}))
    plans = plan_rallies(parameters)

    def missing_rallies() -> list[RallyPlan]:
        _check_parameters(root, requested)
        return [plan for plan in plans if not is_complete(root, plan)]

    if (root / "demo.json").is_file() and not missing_rallies():  # needs no lock, which a read-only folder cannot have
        return
    with _acquire_lock(root):  # other processes that create the same dataset wait
        missing = missing_rallies()
        if not missing and (root / "demo.json").is_file():
            return
        atomic_write_bytes(root / "demo.partial.json", json.dumps({"parameters": requested}).encode())
        (root / "demo.json").unlink(missing_ok=True)
        _render_all(root, missing, parameters, min(workers or available_cores(), max(len(missing), 1)), progress)
        records = {split: [rally_record(p, parameters) for p in plans if p.split == split] for split in SPLITS}
        for name, split in ANNOTATION_FILES.items():
            atomic_write_bytes(root / name, json.dumps(records[split], indent=2).encode())
        atomic_write_bytes(root / "demo.json", json.dumps({"parameters": requested}, indent=2).encode())
        (root / "demo.partial.json").unlink()
