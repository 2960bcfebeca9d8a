"""The demo dataset: rendered tennis rallies in exactly the layout of the real data, made on first use.

``python -m mmdistill.data.demo ROOT``. Under ROOT:

- ``vid_frames_224/{video}/{frame:06d}.jpg``: 64 x 68 px by default; the folder has the real data's name
- ``tennis_flows/{video}/pair_{frame:05d}.npy``: DIS flow frame -> frame + 1, int8 with a scale (`flowfile`), computed
  from the rendered pictures before JPEG
- ``skeletons/f3set-tennis/{video}.pkl``: the true joints of the near (0) and far (1) player, COCO-17
- ``train.json``, ``val.json`` (no shared player, no shared court), ``unlabel.json`` (the training rallies)
- ``demo.json``: the parameters, written last

A stroke's class is (type, side, technique, direction) of its F3Set label; see `demo_motion.STROKES`. Every random
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
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmdistill.data import demo_motion as motion
from mmdistill.data import demo_render as render
from mmdistill.data.flowfile import write_flow

FORMAT = 1  # raised when the same parameters give other bytes
FRAME_DIR, FLOW_DIR, SKELETON_DIR = "vid_frames_224", "tennis_flows", "skeletons/f3set-tennis"
SPLITS = ("train", "val")
FPS = 11.0
DEFAULT_NUISANCE = 0.6
# Frames around a contact that its 8-frame window needs: 4 before, 3 after and one more for the last flow pair.
LEAD_IN, LEAD_OUT = 5, 6
_STREAMS = {"plan": 1, "player": 2, "court": 3, "look": 4, "near": 5, "far": 6, "camera": 7, "sensor": 8}


class DemoError(ValueError):
    """A folder that cannot become the requested demo dataset; the message says what to do."""


@dataclass(frozen=True)
class DemoParameters:
    """What the bytes of a demo dataset depend on.

    Attributes:
        seed: of everything random.
        nuisance: strength of colours, light, shake, blur, noise and JPEG; 0 none, 1 strong.
        frame_size: (H, W) px.
        strokes_per_class: (train, val) strokes of each class.
        strokes_per_rally: at most so many in one rally, each of another class.
        people: players and courts of each split.
    """

    seed: int = 0
    nuisance: float = DEFAULT_NUISANCE
    frame_size: tuple[int, int] = (64, 68)
    strokes_per_class: tuple[int, int] = (24, 24)
    strokes_per_rally: int = 8
    people: int = 12

    def __post_init__(self) -> None:
        if self.nuisance < 0:
            raise DemoError(f"nuisance is {self.nuisance}, but 0 (none) is the least")
        if min(self.frame_size) < 32:
            raise DemoError(f"frame_size is {self.frame_size}, too small to see a player; 32 px is the least")
        if min(self.strokes_per_class) < 1 or not 1 <= self.strokes_per_rally <= len(motion.STROKES):
            raise DemoError(
                f"strokes_per_class {self.strokes_per_class} must be positive and strokes_per_rally "
                f"{self.strokes_per_rally} between 1 and {len(motion.STROKES)}"
            )

    def rng(self, stream: str, *ids: int) -> np.random.Generator:
        """The generator of one purpose; independent of every other one."""
        return np.random.default_rng([self.seed, _STREAMS[stream], *ids])


@dataclass(frozen=True)
class RallyPlan:
    """One rally before it is rendered. `player`, `opponent` and `court` are unique over both splits."""

    video: str
    split: str
    number: int  # unique over both splits
    player: int
    opponent: int
    court: int
    strokes: tuple[int, ...]  # indices into `demo_motion.STROKES`
    frames: tuple[int, ...]  # contacts
    num_frames: int


def plan_rallies(parameters: DemoParameters) -> list[RallyPlan]:
    """All rallies of both splits; nothing is rendered."""
    plans: list[RallyPlan] = []
    for s, split in enumerate(SPLITS):
        rng = parameters.rng("plan", s)
        left = np.full(len(motion.STROKES), parameters.strokes_per_class[s])
        first = s * parameters.people
        players, courts = rng.permutation(parameters.people), rng.permutation(parameters.people)
        k = 0
        while left.any():
            # The classes with most strokes left, so that all run out together and no rally repeats one.
            order = np.argsort(-left + 0.5 * rng.uniform(size=len(left)), kind="stable")
            chosen = [int(c) for c in order[: parameters.strokes_per_rally] if left[c] > 0]
            left[chosen] -= 1
            rng.shuffle(chosen)
            chosen.sort(key=lambda c: motion.STROKES[c].fields[0] != "serve")  # serves open a rally
            frames = LEAD_IN + np.concatenate([[0], np.cumsum(rng.choice([8, 9, 10], len(chosen) - 1))]).astype(int)
            turn = k // parameters.people
            plans.append(
                RallyPlan(
                    video=f"demo_{split}_{k:03d}",
                    split=split,
                    number=1000 * s + k,
                    player=first + int(players[k % parameters.people]),
                    opponent=first + int(players[(k + 1 + turn) % parameters.people]),
                    court=first + int(courts[(k + 3 * turn) % parameters.people]),
                    strokes=tuple(chosen),
                    frames=tuple(int(f) for f in frames),
                    num_frames=int(frames[-1]) + LEAD_OUT,
                )
            )
            k += 1
    return plans


def rally_record(plan: RallyPlan, parameters: DemoParameters) -> dict[str, Any]:
    """The rally as F3Set writes it. Court side, approach and outcome are drawn at random: they are not the class."""
    rng = parameters.rng("plan", 9, plan.number)
    height, width = parameters.frame_size
    events = []
    for k, (stroke, frame) in enumerate(zip(plan.strokes, plan.frames, strict=True)):
        kind, side, technique, direction = motion.STROKES[stroke].fields
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


@dataclass(frozen=True)
class RallyScene:
    """A rally ready to be drawn.

    Attributes:
        camera, affine: the camera and its shake (T, 2, 3).
        players: near, far.
        keypoints: (2, T, 17, 2) px, true joints.
        ball: (T, 3) metres.
        look: colours and light. court: the empty court, enlarged.
    """

    camera: render.Camera
    affine: np.ndarray
    players: tuple[render.Drawn, render.Drawn]
    keypoints: np.ndarray
    ball: np.ndarray
    look: render.Look
    court: np.ndarray


def _far_strokes(plan: RallyPlan, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """The far player's answers, half-way between the near player's contacts; he never serves."""
    others = [k for k, stroke in enumerate(motion.STROKES) if stroke.fields[0] != "serve"]
    middle = [0.5 * (a + b) for a, b in zip(plan.frames, plan.frames[1:], strict=False)]
    contacts = [*middle, plan.frames[-1] + 4.5]
    return [int(rng.choice(others)) for _ in contacts], contacts


def _ball_track(near: motion.Figure, far: motion.Figure, plan: RallyPlan, far_contacts: list[float]) -> np.ndarray:
    """Flight from racket to racket, (T, 3) metres."""
    last = plan.num_frames - 1
    stops: list[tuple[float, np.ndarray]] = []
    for frame, answer in zip(plan.frames, far_contacts, strict=True):
        stops.append((frame, near.grip[frame] + 0.5 * near.racket[frame]))
        k = min(round(answer), last)
        stops.append((answer, far.grip[k] + 0.5 * far.racket[k]))
    stops.insert(0, (plan.frames[0] - 4.5, stops[1][1]))
    times, places = np.array([s[0] for s in stops]), np.stack([s[1] for s in stops])
    t = np.clip(np.arange(plan.num_frames), times[0], times[-1])
    ball = np.stack([np.interp(t, times, places[:, d]) for d in range(3)], -1)
    i = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    u = (t - times[i]) / (times[i + 1] - times[i])
    ball[:, 2] += 4 * 1.1 * u * (1 - u)
    return ball


def build_scene(plan: RallyPlan, parameters: DemoParameters) -> RallyScene:
    """Motion, camera and colours of a rally."""
    size, n, number = parameters.frame_size, parameters.nuisance, plan.number
    body = motion.random_body(parameters.rng("player", plan.player))
    other = motion.random_body(parameters.rng("player", plan.opponent))
    court = render.random_court(parameters.rng("court", plan.court), n)
    rng = parameters.rng("look", number)
    look = render.random_look(court, rng, n)
    outfits = [render.random_outfit(look, rng, n) for _ in range(2)]

    rng = parameters.rng("near", number)
    poses = motion.pose_track(list(plan.strokes), [float(f) for f in plan.frames], plan.num_frames, body, rng)
    walk = motion.walk_track([float(f) for f in plan.frames], plan.num_frames, 0.32, rng)
    near = motion.solve(poses, *walk, float(rng.uniform(-0.9, 0.1)), body, facing=1)
    rng = parameters.rng("far", number)
    strokes, contacts = _far_strokes(plan, rng)
    poses = motion.pose_track(strokes, contacts, plan.num_frames, other, rng)
    walk = motion.walk_track(contacts, plan.num_frames, 1.5, rng)
    far = motion.solve(poses, *walk, render.COURT_LENGTH + float(rng.uniform(-1.5, 0.5)), other, facing=-1)

    rng = parameters.rng("camera", number)
    spread = min(n, 1.5)
    share = 0.575 + 0.02 * spread * rng.uniform(-1, 1)  # of the picture's height that a standing player fills
    visible = 1.79 / share
    distance, height = float(court["distance"]), float(court["height"])
    ground = near.ground[:, 1].mean()
    position = (float(court["aim"]) + 0.15 * spread * rng.uniform(-1, 1), ground - distance, height)
    target = (0.06 * spread * rng.uniform(-1, 1), ground, visible * (0.5 - 0.075))
    focal = size[0] * float(np.hypot(distance, height - target[2])) / visible
    camera = render.Camera.look(position, target, focal, size)
    affine = render.shake(plan.num_frames, look.jitter * size[0] / 64, size, rng)
    keypoints = np.stack([render.apply_affine(affine, camera.project(f.joints)[0]) for f in (near, far)])
    return RallyScene(
        camera=camera,
        affine=affine,
        players=(
            render.Drawn(near, outfits[0], body.height, body.build),
            render.Drawn(far, outfits[1], other.height, other.build),
        ),
        keypoints=keypoints.astype(np.float32),
        ball=_ball_track(near, far, plan, contacts),
        look=look,
        court=render.draw_court(camera, look, rng, size),
    )


def _draw_ball(canvas: render.Canvas, scene: RallyScene, t: int) -> None:
    uv, depth = scene.camera.project(scene.ball[t])
    uv = scene.affine[t, :, :2] @ uv + scene.affine[t, :, 2]
    radius = max(0.06 * scene.camera.focal / float(depth), 0.55)
    canvas.hull(uv[None], np.array([radius]), (226.0, 240.0, 90.0))


def render_rally(scene: RallyScene, plan: RallyPlan, parameters: DemoParameters) -> Iterator[np.ndarray]:
    """The pictures of a rally, uint8 (H, W, 3) RGB, before JPEG."""
    rng = parameters.rng("sensor", plan.number)
    light = render.light_map(scene.look, parameters.frame_size)
    for t in range(plan.num_frames):
        canvas = render.Canvas(render.warped_court(scene.court, scene.affine[t]))
        near, far = scene.players
        render.draw_figure(canvas, scene.camera, scene.affine[t], far, t)
        if scene.ball[t, 1] > near.figure.ground[t, 1] + 0.8:
            _draw_ball(canvas, scene, t)
            render.draw_figure(canvas, scene.camera, scene.affine[t], near, t)
        else:
            render.draw_figure(canvas, scene.camera, scene.affine[t], near, t)
            _draw_ball(canvas, scene, t)
        yield render.develop(canvas, scene.look, light, rng)


def figure_mask(scene: RallyScene, t: int, parameters: DemoParameters, *, person: int = 0) -> np.ndarray:
    """Where a player is drawn in frame t, racket included: bool (H, W)."""
    white = (255.0, 255.0, 255.0)
    drawn = scene.players[person]
    outfit = render.Outfit(**{**dict.fromkeys(render.Outfit.__dataclass_fields__, white), "sleeve": 0.5})
    canvas = render.Canvas.blank(parameters.frame_size)
    render.draw_figure(
        canvas, scene.camera, scene.affine[t], render.Drawn(drawn.figure, outfit, drawn.height, drawn.build), t
    )
    return canvas.reduced()[..., 0] > 60


def _write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    _write_bytes(root / SKELETON_DIR / f"{plan.video}.pkl", skeleton_bytes(scene, plan, parameters))
    return plan.video


def skeleton_bytes(scene: RallyScene, plan: RallyPlan, parameters: DemoParameters) -> bytes:
    """The skeleton pickle: plain containers and NumPy arrays."""
    buffer = io.BytesIO()
    pickle.dump(
        {
            "keypoint": scene.keypoints,
            "keypoint_score": np.ones(scene.keypoints.shape[:3], np.float32),
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
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("demo data"), BarColumn(), MofNCompleteColumn(), TextColumn("rallies"), TimeElapsedColumn(),
        TimeRemainingColumn(), console=console, disable=not (progress and console.is_terminal),
    )  # fmt: skip
    with bar:
        task = bar.add_task("demo data", total=len(plans))

        def count(done: int) -> None:
            bar.update(task, completed=done)
            if progress and not console.is_terminal and (done % 10 == 0 or done == len(plans)):
                print(f"demo data: {done}/{len(plans)} rallies", file=sys.stderr, flush=True)

        if workers == 1:
            for done, plan in enumerate(plans, 1):
                make_rally(root, plan, parameters)
                count(done)
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(make_rally, root, plan, parameters) for plan in plans]
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                count(done)


def make_demo(
    root: Path,
    *,
    seed: int = 0,
    nuisance: float = DEFAULT_NUISANCE,
    frame_size: tuple[int, int] = (64, 68),
    strokes_per_class: tuple[int, int] = (24, 24),
    strokes_per_rally: int = 8,
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
        _write_bytes(root / "demo.partial.json", json.dumps({"parameters": wanted}).encode())
        (root / "demo.json").unlink(missing_ok=True)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        _render_all(root, missing, parameters, min(workers or cores, max(len(missing), 1)), progress)
        records = {split: [rally_record(p, parameters) for p in plans if p.split == split] for split in SPLITS}
        for name, split in (("train", "train"), ("val", "val"), ("unlabel", "train")):
            _write_bytes(root / f"{name}.json", json.dumps(records[split], indent=2).encode())
        _write_bytes(root / "demo.json", json.dumps({"parameters": wanted}, indent=2).encode())
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
