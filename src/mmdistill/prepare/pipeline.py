"""Many videos to the tennis layout: in parallel, resumable, each file whole or not there.

OUTPUT/vid_frames_224/{video}/{frame:06d}.jpg        OUTPUT/skeletons/f3set-tennis/{video}.pkl
OUTPUT/tennis_flows/{video}/pair_{frame:05d}.npy     OUTPUT/unlabel.json  OUTPUT/provenance.json
"""

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmdistill import __version__
from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.readers.flow_file import FLOW_DTYPES, write_flow
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare.flow import FLOW_METHODS, flow_function
from mmdistill.prepare.video import VideoError, decode, frame_rate, promised_frames, repeated_frames

FRAMES, FLOWS, SKELETONS, STATES = "vid_frames_224", "tennis_flows", "skeletons/f3set-tennis", ".prepared"
FINGERPRINT_BYTES = 1 << 20  # of the head and the tail of a video


@dataclass(frozen=True)
class Settings:
    """How videos are prepared.

    Attributes:
        height: of the stored frames, px; the width keeps the aspect (1920 x 1080 becomes 398 x 224).
        quality: of the JPEGs.
        flow: ``dis``, ``farneback`` or ``none``.
        flow_dtype: how flow is stored, see `write_flow`.
        skeleton: ``mediapipe`` or ``none``.
        split: height that divides near from far player, as a fraction from the top.
    """

    height: int = 224
    quality: int = 95
    flow: str = "dis"
    flow_dtype: str = "float16"
    skeleton: str = "none"
    split: float = 0.4

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("flow", self.flow, (*FLOW_METHODS, "none")),
            ("flow_dtype", self.flow_dtype, FLOW_DTYPES),
            ("skeleton", self.skeleton, ("mediapipe", "none")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if self.height < 16 or not 1 <= self.quality <= 100 or not 0 <= self.split <= 1:
            raise ValueError(f"height, quality or split out of range: {self}")

    def parts(self) -> dict[str, dict[str, Any]]:
        """What each part of the output depends on."""
        pictures = {"height": self.height}
        return {
            "frames": {**pictures, "quality": self.quality},
            "flow": {**pictures, "method": self.flow, "dtype": self.flow_dtype},
            "skeleton": {"method": self.skeleton, "split": self.split},
        }


@dataclass(frozen=True)
class Outcome:
    """What became of one video: its record, or the error that ended it."""

    video: str
    record: dict[str, Any] | None
    error: str | None


def prepare_all(
    videos: dict[str, Path], output: Path, settings: Settings, *, workers: int, progress: Callable[[Outcome], None]
) -> list[Outcome]:
    """Prepare every video, then write `unlabel.json` and `provenance.json` over all that are whole in `output`.

    A broken video ends with an error in its `Outcome`; the others go on.
    """
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    context = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        jobs = {pool.submit(prepare_video, name, path, output, settings): name for name, path in videos.items()}
        for job in as_completed(jobs):
            try:
                outcomes.append(job.result())
            except BrokenProcessPool:  # killed from outside, out of memory, or a decoder that crashed
                message = "a worker process died; start again, with --workers 1 to see which video it was"
                outcomes.append(Outcome(jobs[job], None, message))
            progress(outcomes[-1])
    write_annotations(output)
    return sorted(outcomes, key=lambda o: o.video)


def prepare_video(name: str, path: Path, output: Path, settings: Settings) -> Outcome:
    """One video. Files that are there from an interrupted run with the same source and settings are kept."""
    cv2.setNumThreads(1)  # videos are the parallelism
    try:
        state = output / STATES / f"{name}.json"
        known, wanted = _begin(name, path, output, settings)
        if known.get("complete") and known["parts"] == wanted["parts"] and _all_there(name, output, known):
            return Outcome(name, known, None)
        record = {**wanted, **_frames_and_flow(name, path, output, settings)}
        if settings.skeleton == "mediapipe":
            record["skeleton_frames"] = _skeletons(name, path, output, settings)
        record["complete"] = True
        atomic_write_bytes(state, json.dumps(record).encode())
    except (ValueError, OSError, cv2.error) as error:
        return Outcome(name, None, str(error))
    return Outcome(name, record, None)


def _begin(name: str, path: Path, output: Path, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is recorded, what is wanted); removes parts that were made from another source or with other settings."""
    state = output / STATES / f"{name}.json"
    state.parent.mkdir(parents=True, exist_ok=True)
    wanted: dict[str, Any] = {"source": path.name, "fingerprint": _fingerprint(path), "parts": settings.parts()}
    known: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    folders = {"frames": output / FRAMES / name, "flow": output / FLOWS / name}
    files = {"skeleton": output / SKELETONS / f"{name}.pkl"}
    if not known and (taken := [str(p) for p in (*folders.values(), *files.values()) if p.exists()]):
        raise ValueError(
            f"{path}: {taken[0]} is already there and not made by this script; choose another output folder"
        )
    for part, settings_of_part in wanted["parts"].items():
        same = known.get("fingerprint") == wanted["fingerprint"] and known["parts"].get(part) == settings_of_part
        if known and not same:
            known["complete"] = False
            if part in folders:
                shutil.rmtree(folders[part], ignore_errors=True)
            else:
                files[part].unlink(missing_ok=True)
    for folder in folders.values():
        for leftover in folder.glob(".tmp-*"):  # of a run that was killed in the middle of a write
            leftover.unlink()
    if not known.get("complete"):
        atomic_write_bytes(state, json.dumps({**wanted, "complete": False}).encode())
    return known, wanted


def _all_there(name: str, output: Path, record: dict[str, Any]) -> bool:
    """Whether no file of a finished video was deleted since."""
    count = record["num_frames"]
    pictures = len(list((output / FRAMES / name).glob("*.jpg"))) == count
    flows = record["parts"]["flow"]["method"] == "none" or (
        len(list((output / FLOWS / name).glob("pair_*.npy"))) == count - 1
    )
    skeleton = record["parts"]["skeleton"]["method"] == "none" or (output / SKELETONS / f"{name}.pkl").exists()
    return pictures and flows and skeleton


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return f"{size}:{digest.hexdigest()}"


def stored_size(height: int, width: int, stored_height: int) -> tuple[int, int]:
    """(height, width) of the stored frames of a video, in px."""
    return stored_height, max(1, round(width * stored_height / height))


def _frames_and_flow(name: str, path: Path, output: Path, settings: Settings) -> dict[str, Any]:
    frames, flows = output / FRAMES / name, output / FLOWS / name
    frames.mkdir(parents=True, exist_ok=True)
    flow = None
    if settings.flow != "none":
        flows.mkdir(parents=True, exist_ok=True)
        flow = flow_function(settings.flow)
    seconds: list[float] = []
    changes: list[float] = []
    source, stored = (0, 0), (0, 0)
    before: np.ndarray | None = None
    for frame in decode(path):
        if frame.number == 0:
            source = frame.pixels.shape[:2]
            stored = stored_size(*source, settings.height)
        elif frame.pixels.shape[:2] != source:
            raise VideoError(f"{path}: its size changes at frame {frame.number}")
        picture = cv2.resize(frame.pixels, stored[::-1], interpolation=cv2.INTER_AREA)
        _write_jpeg(frames / f"{frame.number:06d}.jpg", picture, settings.quality)
        grey = cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)
        if before is not None:
            changes.append(float(cv2.absdiff(before, grey).mean()))
            target = flows / f"pair_{frame.number - 1:05d}.npy"
            if flow is not None and not target.exists():
                write_flow(target, flow(before, grey), dtype=settings.flow_dtype)
        before = grey
        seconds.append(frame.seconds)
    rate = frame_rate(seconds)
    apart = max((abs(s - seconds[0] - k / rate) for k, s in enumerate(seconds)), default=0.0) if rate else 0.0
    irregular = apart * rate > 0.5  # frames
    return {
        "num_frames": len(seconds),
        "promised_frames": promised_frames(path),
        "fps": rate or 25.0,  # one frame has no rate; the annotation needs one
        "largest_timestamp_deviation_s": round(apart, 6),
        **({"timestamps_s": [round(s, 6) for s in seconds]} if irregular else {}),
        "repeated_frames": repeated_frames(changes),
        "source_size": list(source),
        "stored_size": list(stored),
    }


def _write_jpeg(path: Path, picture: np.ndarray, quality: int) -> None:
    if path.exists():
        return
    good, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not good:
        raise ValueError(f"{path}: OpenCV cannot encode this picture")
    atomic_write_bytes(path, data.tobytes())


def _skeletons(name: str, path: Path, output: Path, settings: Settings) -> dict[str, int]:
    from mmdistill.prepare.pose import mediapipe_pose, write_skeletons

    target = output / SKELETONS / f"{name}.pkl"
    target.parent.mkdir(parents=True, exist_ok=True)
    return asdict(write_skeletons(path, target, split=settings.split, pose=mediapipe_pose()))


def write_annotations(output: Path) -> list[Rally]:
    """`unlabel.json` (every whole video a rally without events) and `provenance.json`, from what is in `output`."""
    records = {}
    for state in sorted((output / STATES).glob("*.json")):
        record = json.loads(state.read_text())
        if record["complete"]:
            records[state.stem] = record
    rallies = [Rally(name, r["num_frames"], r["fps"], ()) for name, r in records.items()]
    atomic_write_bytes(output / "unlabel.json", (json.dumps(to_json(rallies), indent=1) + "\n").encode())
    methods = sorted({r["parts"]["flow"]["method"] for r in records.values()})
    provenance = {
        "made_by": f"mmdistill {__version__}",
        "opencv": cv2.__version__,
        "frames": "numbered from 0 in the decoder's order, resized with INTER_AREA",
        "flow": {
            "methods": {m: FLOW_METHODS.get(m, "no flow") for m in methods},
            "pair": "pair k leads from frame k to frame k + 1",
            "channels": "x, y",
            "unit": "px of the stored frame",
            "computed_on": "grey stored frames before JPEG compression",
        },
        "skeleton": "persons 0 near and 1 far; COCO-17 in px of the source; score 0 where absent",
        "videos": records,
    }
    atomic_write_bytes(output / "provenance.json", (json.dumps(provenance, indent=1) + "\n").encode())
    return rallies
