"""Preparation of videos in the tennis layout: parallel, resumable, with atomic writes.

OUTPUT/vid_frames_224/{video}/{frame:06d}.jpg        OUTPUT/skeletons/f3set-tennis/{video}.pkl
OUTPUT/tennis_flows/{video}/pair_{frame:05d}.npy     OUTPUT/contact_sheets/{video}.jpg
OUTPUT/unlabel.json                                  OUTPUT/provenance.json

With `Settings.pack` the files of a video are packed when all of them are written:

OUTPUT/vid_frames_224/{video}/frames.zip             OUTPUT/tennis_flows/{video}/flow.npy
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

import av
import cv2
import numpy as np

from mmdistill import __version__
from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.readers.flow_file import FLOW_DTYPES, PACKED_FLOW, open_packed_flow, pack_flow, write_flow
from mmdistill.data.readers.zip_file import ZIP_NAME, write_zip, zip_names
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare.flow import FLOW_METHODS, make_flow_function
from mmdistill.prepare.placement import FITS, Placement, fit_into, scale_to_height
from mmdistill.prepare.pose import import_mediapipe, load_mediapipe_pose, write_skeletons
from mmdistill.prepare.video import find_repeated_frames, mean_frame_rate, read_frames, read_header

FRAME_DIR, FLOW_DIR, SKELETON_DIR, RECORD_DIR = "vid_frames_224", "tennis_flows", "skeletons/f3set-tennis", ".prepared"
SHEET_DIR = "contact_sheets"
FINGERPRINT_BYTES = 1 << 20  # read from the start and from the end of a video
TRACKING_VERSION = 2  # of `find_players`: 1 has no compensation of camera motion
JPEG_BYTES_PER_PX = 0.5  # a rough upper estimate for quality 95
DEFAULT_FPS = 25.0  # of a video with a single frame: the annotation requires a frame rate


@dataclass(frozen=True)
class Settings:
    """How videos are prepared."""

    # height of the stored frames in px. The width keeps the aspect ratio (1920 x 1080 becomes 398 x 224)
    height: int = 224
    size: tuple[int, int] | None = None  # (height, width) of all stored frames in px; None: by `height`
    fit: str = "pad"  # with `size`: ``pad`` adds black borders, ``crop`` cuts the borders off
    fps: float | None = None  # frame rate of the stored frames; None: every frame of the video
    quality: int = 95  # JPEG quality, 1 to 100
    flow: str = "dis"  # ``dis``, ``farneback`` or ``none``
    flow_dtype: str = "float16"  # number format of the flow files, see `write_flow`
    skeleton: str = "none"  # ``mediapipe`` or ``none``
    split: float = 0.4  # image height that separates the near from the far player, as a fraction from the top
    pack: bool = False  # one file of frames and one of flow per video

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("flow", self.flow, (*FLOW_METHODS, "none")),
            ("flow_dtype", self.flow_dtype, FLOW_DTYPES),
            ("skeleton", self.skeleton, ("mediapipe", "none")),
            ("fit", self.fit, FITS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if self.height < 16 or not 1 <= self.quality <= 100 or not 0 <= self.split <= 1:
            raise ValueError(f"height, quality or split is out of range: {self}")
        if (self.size is not None and min(self.size) < 16) or (self.fps is not None and self.fps <= 0):
            raise ValueError(f"size={self.size} must be at least 16 x 16 px, and fps={self.fps} must be positive")

    def placement(self, source: tuple[int, int]) -> Placement:
        """Placement of a video of (height, width) px in the stored frames."""
        return fit_into(source, self.size, self.fit) if self.size else scale_to_height(source, self.height)

    def by_output(self) -> dict[str, dict[str, Any]]:
        """The settings that each kind of output file depends on."""
        shape: dict[str, Any] = {"size": list(self.size), "fit": self.fit} if self.size else {"height": self.height}
        rate = {} if self.fps is None else {"fps": self.fps}
        found = {"method": self.skeleton, "split": self.split, "tracking": TRACKING_VERSION}
        return {
            "frames": {**shape, **rate, "quality": self.quality},
            "flow": {**shape, **rate, "method": self.flow, "dtype": self.flow_dtype},
            "skeleton": {**found, **rate, **(shape if self.size else {})},
        }


def estimate_output(videos: dict[str, Path], settings: Settings) -> tuple[int, int]:
    """Number of files and of bytes that all videos need, from what their containers declare.

    With ``settings.pack`` the bytes include the separate files of the largest video, which exist while it is packed.
    """
    files = num_bytes = largest = 0
    for path in videos.values():
        header = read_header(path)
        if not header.frames:
            continue
        count = header.frames if settings.fps is None else round(header.seconds * settings.fps)
        height, width = settings.placement(header.frame_size).stored
        per_kind = 1 if settings.pack else count
        files += per_kind
        size = round(count * height * width * JPEG_BYTES_PER_PX)
        if settings.flow != "none":
            files += per_kind
            size += count * 2 * height * width * np.dtype(settings.flow_dtype).itemsize
        num_bytes += size
        largest = max(largest, size)
    return files, num_bytes + (largest if settings.pack else 0)


@dataclass(frozen=True)
class PrepareResult:
    """Result of one video: its record, or the message of the error that stopped it."""

    video: str
    record: dict[str, Any] | None
    error: str | None
    reused: bool = False  # whether an earlier run completed the video

    @property
    def lacks_a_player(self) -> bool:
        """Whether the near or the far player has a skeleton in less than half of the frames."""
        found = self.record.get("skeleton_frames") if self.record else None
        return found is not None and 2 * min(found["near"], found["far"]) < found["frames"]


@dataclass(frozen=True)
class _Outputs:
    """Paths of the files of one video."""

    record: Path
    frames: Path
    flow: Path
    skeleton: Path

    @classmethod
    def of(cls, name: str, output: Path) -> "_Outputs":
        record, skeleton = output / RECORD_DIR / f"{name}.json", output / SKELETON_DIR / f"{name}.pkl"
        return cls(record, output / FRAME_DIR / name, output / FLOW_DIR / name, skeleton)

    def are_complete(self, record: dict[str, Any]) -> bool:
        """Whether the files of a completed video still exist; they are counted, not opened."""
        count, parts = record["num_frames"], record["parts"]
        return (
            (self.frames_zip.exists() or len(self.images()) == count)
            and (parts["flow"]["method"] == "none" or self.packed_flow.exists() or len(self.pairs()) == count - 1)
            and (parts["skeleton"]["method"] == "none" or self.skeleton.exists())
        )

    @property
    def frames_zip(self) -> Path:
        """The packed frames."""
        return self.frames / ZIP_NAME

    @property
    def packed_flow(self) -> Path:
        """The packed flow."""
        return self.flow / PACKED_FLOW

    def images(self) -> list[Path]:
        """The frames that are separate files."""
        return list(self.frames.glob("*.jpg"))

    def pairs(self) -> list[Path]:
        """The flow that is in separate files."""
        return list(self.flow.glob("pair_*.npy"))

    def pack(self) -> None:
        """Replace the separate files by the packed ones. It may be interrupted at any time and repeated."""
        for target, files, write in (
            (self.frames_zip, self.images(), write_zip),
            (self.packed_flow, self.pairs(), pack_flow),
        ):
            if files and not target.exists():
                write(target, files)
            for file in files:
                file.unlink()

    def remove_damaged(self) -> None:
        """Remove packed files that are truncated or damaged. They are then written again."""
        for target, check in ((self.frames_zip, zip_names), (self.packed_flow, open_packed_flow)):
            try:
                if target.exists():
                    check(str(target))
            except ValueError:
                target.unlink()


def prepare_all(
    videos: dict[str, Path],
    output: Path,
    settings: Settings,
    *,
    workers: int,
    progress: Callable[[PrepareResult], None],
) -> list[PrepareResult]:
    """Prepare every video, then write `unlabel.json` and `provenance.json` for all complete videos in `output`.

    A video that cannot be prepared gets an error in its `PrepareResult`; the other videos are still prepared.

    Raises:
        PoseError: skeletons are requested and MediaPipe is not installed.
    """
    if settings.skeleton == "mediapipe":
        import_mediapipe()  # raises here once, instead of in the worker of each video
    output.mkdir(parents=True, exist_ok=True)
    results = []
    context = multiprocessing.get_context("spawn")  # OpenCV's threads do not survive a fork
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        jobs = {pool.submit(prepare_video, name, path, output, settings): name for name, path in videos.items()}
        for job in as_completed(jobs):
            try:
                results.append(job.result())
            except BrokenProcessPool:  # killed from outside, out of memory, or a decoder that crashed
                message = "a worker process exited; rerun with --workers 1 to find the video that causes it"
                results.append(PrepareResult(jobs[job], None, message))
            progress(results[-1])
    write_annotations(output)
    return sorted(results, key=lambda r: r.video)


def prepare_video(name: str, path: Path, output: Path, settings: Settings) -> PrepareResult:
    """Prepare one video. Existing files from the same source and settings are kept."""
    cv2.setNumThreads(1)  # the parallelism is over videos
    files = _Outputs.of(name, output)
    try:
        record: dict[str, Any] = {"source": path.name, "fingerprint": _fingerprint(path), "parts": settings.by_output()}
        old = _remove_outdated(path, files, record)
        files.remove_damaged()
        if old.get("complete") and old["parts"] == record["parts"] and files.are_complete(old):
            if settings.pack:
                files.pack()
            return PrepareResult(name, old, None, reused=True)
        record |= _write_frames_and_flow(path, files, settings)
        if settings.skeleton == "mediapipe":
            sheet = output / SHEET_DIR / f"{name}.jpg"
            place = settings.placement(tuple(record["source_size"])) if settings.size else None
            counts = write_skeletons(
                lambda: read_frames(path, settings.fps),
                files.skeleton,
                sheet,
                split=settings.split,
                pose=load_mediapipe_pose(),
                place=place,
            )
            record["skeleton_frames"] = asdict(counts)
        if settings.pack:
            files.pack()
        record["complete"] = True
        atomic_write_bytes(files.record, json.dumps(record).encode())
    except (ValueError, OSError, cv2.error) as error:
        return PrepareResult(name, None, str(error))
    return PrepareResult(name, record, None)


def _remove_outdated(path: Path, files: _Outputs, new: dict[str, Any]) -> dict[str, Any]:
    """Remove the files that another source or other settings produced, and mark the record as incomplete.

    Returns:
        The record of the earlier run, empty if there is none.
    """
    old: dict[str, Any] = json.loads(files.record.read_bytes()) if files.record.exists() else {}
    targets = {"frames": files.frames, "flow": files.flow, "skeleton": files.skeleton}
    existing = [str(target) for target in targets.values() if target.exists()]
    if existing and not old:
        raise ValueError(f"{path}: {existing[0]} exists and was not written by mmdistill; choose another --output")
    for kind, target in targets.items():
        if old and (old["fingerprint"] != new["fingerprint"] or old["parts"].get(kind) != new["parts"][kind]):
            old["complete"] = False
            remove = shutil.rmtree if target.is_dir() else Path.unlink
            if target.exists():
                remove(target)
        for temporary in target.glob(".tmp-*"):  # left by a run that was killed during a write
            temporary.unlink()
    if not old.get("complete"):
        atomic_write_bytes(files.record, json.dumps({**new, "complete": False}).encode())
    return old


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(FINGERPRINT_BYTES))
        file.seek(max(0, size - FINGERPRINT_BYTES))
        digest.update(file.read(FINGERPRINT_BYTES))
    return f"{size}:{digest.hexdigest()}"


def _write_frames_and_flow(path: Path, files: _Outputs, settings: Settings) -> dict[str, Any]:
    """Write the missing frames and flow files of a video and return what was measured on it."""
    files.frames.mkdir(parents=True, exist_ok=True)
    has_flow = settings.flow == "none" or files.packed_flow.exists()
    compute_flow = None if has_flow else make_flow_function(settings.flow)
    has_images = files.frames_zip.exists()
    seconds: list[float] = []
    differences: list[float] = []
    source, is_interlaced = (0, 0), False
    previous: np.ndarray | None = None
    for frame in read_frames(path, settings.fps):
        source, is_interlaced = frame.pixels.shape[:2], frame.is_interlaced
        image = settings.placement(source).place(frame.pixels)
        if not has_images:
            _write_jpeg(files.frames / f"{frame.number:06d}.jpg", image, settings.quality)
        gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        if previous is not None:
            differences.append(float(cv2.absdiff(previous, gray).mean()))
            flow_path = files.flow / f"pair_{frame.number - 1:05d}.npy"
            if compute_flow is not None and not flow_path.exists():
                write_flow(flow_path, compute_flow(previous, gray), dtype=settings.flow_dtype)
        previous = gray
        seconds.append(frame.seconds)
    fps = mean_frame_rate(seconds)
    deviation = max((abs(s - k / fps) for k, s in enumerate(seconds)), default=0.0) if fps else 0.0
    is_irregular = deviation * fps > 0.5  # frames
    header = read_header(path)
    return {
        "num_frames": len(seconds),
        "container_frame_count": 0 if header.is_estimate else header.frames,
        "interlaced": is_interlaced,
        "hdr": header.hdr,
        "fps": fps or DEFAULT_FPS,
        "largest_timestamp_deviation_s": round(deviation, 6),
        **({"timestamps_s": [round(s, 6) for s in seconds]} if is_irregular else {}),
        "repeated_frames": find_repeated_frames(differences),
        "source_size": list(source),
        "stored_size": list(settings.placement(source).stored),
    }


def _write_jpeg(path: Path, image: np.ndarray, quality: int) -> None:
    if path.exists():
        return
    success, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not success:
        raise ValueError(f"{path}: OpenCV cannot encode this image as JPEG")
    atomic_write_bytes(path, data.tobytes())


def write_annotations(output: Path) -> list[Rally]:
    """Write `unlabel.json`, with each complete video in `output` as a rally without events, and `provenance.json`."""
    found = {path.stem: json.loads(path.read_bytes()) for path in sorted((output / RECORD_DIR).glob("*.json"))}
    records = {name: record for name, record in found.items() if record["complete"]}
    rallies = [Rally(name, r["num_frames"], r["fps"], ()) for name, r in records.items()]
    atomic_write_bytes(output / "unlabel.json", (json.dumps(to_json(rallies), indent=1) + "\n").encode())
    methods = sorted({r["parts"]["flow"]["method"] for r in records.values()})
    provenance = {
        "made_by": f"mmdistill {__version__}",
        "opencv": cv2.__version__,
        "ffmpeg": av.ffmpeg_version_info,
        "frames": "numbered from 0 in the order of presentation; upright, progressive, square pixels; INTER_AREA",
        "packed": "frames.zip contains the frames of a video, row k of flow.npy is pair k",
        "fps": "if set: the frames nearest to the multiples of 1 / fps; else all frames",
        "flow": {
            "methods": {m: FLOW_METHODS.get(m, "no flow") for m in methods},
            "pair": "pair k is the flow from frame k to frame k + 1",
            "channels": "x, y",
            "unit": "px of the stored frame",
            "computed_on": "gray stored frames before JPEG compression",
        },
        "skeleton": "person 0 near, person 1 far; COCO-17 keypoints, score 0 if not found; in px of the source, or "
        "with size in px of the stored frame",
        "videos": records,
    }
    atomic_write_bytes(output / "provenance.json", (json.dumps(provenance, indent=1) + "\n").encode())
    return rallies
