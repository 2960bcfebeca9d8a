"""Preparation of videos in the tennis layout: parallel, resumable, with atomic writes.

OUTPUT/vid_frames_224/{video}/{frame:06d}.jpg        OUTPUT/skeletons/f3set-tennis/{video}.pkl
OUTPUT/tennis_flows/{video}/pair_{frame:05d}.npy     OUTPUT/contact_sheets/{video}.jpg
OUTPUT/unlabel.json                                  OUTPUT/provenance.json

With `Settings.pack` the files of a video are packed when all of them are written:

OUTPUT/vid_frames_224/{video}/frames.zip             OUTPUT/tennis_flows/{video}/flow.npy
"""

import functools
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from mmdistill import __version__
from mmdistill.data.annotations.base import UNKNOWN_FPS, Rally
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.process_pool import process_pool
from mmdistill.data.readers.flow_file import FLOW_DTYPES, write_flow
from mmdistill.errors import format_count
from mmdistill.files import atomic_write_bytes, temporary_folder
from mmdistill.prepare.flow import FLOW_METHODS, make_flow_function
from mmdistill.prepare.outputs import RECORD_DIR, SHEET_DIR, Outputs, remove_outdated
from mmdistill.prepare.placement import FITS, Placement, fit_into, scale_to_height
from mmdistill.prepare.player_tracking import ReadFrames
from mmdistill.prepare.rallies import FrameSpool, RallySpan, check_frame_rate
from mmdistill.prepare.skeleton_sources import SkeletonSource
from mmdistill.prepare.sources import decode_frames, fingerprint, list_frames, read_frames, read_header
from mmdistill.prepare.video import Frame, VideoError, find_repeated_frames, mean_frame_rate
from mmdistill.prepare.vitpose import DETECTOR_MODEL, POSE_MODEL

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
    skeleton: str = "none"  # ``mediapipe``, ``vitpose``, ``none``, or a folder with {video}.pkl
    pose_model: str = POSE_MODEL  # of ``vitpose``: folder, or name on the Hugging Face Hub
    detector_model: str = DETECTOR_MODEL  # the same of its person detector
    split: float = 0.4  # image height that separates the near from the far player, as a fraction from the top
    pack: bool = False  # one file of frames and one of flow per video

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("flow", self.flow, (*FLOW_METHODS, "none")),
            ("flow_dtype", self.flow_dtype, FLOW_DTYPES),
            ("fit", self.fit, FITS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        if self.height < 16 or not 1 <= self.quality <= 100 or not 0 <= self.split <= 1:
            raise ValueError(f"height, quality or split is out of range: {self}")
        if (self.size is not None and min(self.size) < 16) or (self.fps is not None and self.fps <= 0):
            raise ValueError(f"size={self.size} must be at least 16 x 16 px, and fps={self.fps} must be positive")
        self.skeleton_source  # noqa: B018, it checks the method

    @property
    def skeleton_source(self) -> SkeletonSource:
        """Where the skeletons come from."""
        return SkeletonSource(self.skeleton, self.pose_model, self.detector_model, self.split)

    def placement(self, source: tuple[int, int]) -> Placement:
        """Placement of a video of (height, width) px in the stored frames."""
        return fit_into(source, self.size, self.fit) if self.size else scale_to_height(source, self.height)

    def by_output(self) -> dict[str, dict[str, Any]]:
        """The settings that each kind of output file depends on."""
        shape: dict[str, Any] = {"size": list(self.size), "fit": self.fit} if self.size else {"height": self.height}
        rate = {} if self.fps is None else {"fps": self.fps}
        found = {**self.skeleton_source.settings(), "tracking": TRACKING_VERSION}
        return {
            "frames": {**shape, **rate, "quality": self.quality},
            "flow": {**shape, **rate, "method": self.flow, "dtype": self.flow_dtype},
            "skeleton": {**found, **rate, **(shape if self.size else {})},
        }


def estimate_output(
    videos: Mapping[str, Path],
    settings: Settings,
    rallies: Mapping[str, Sequence[RallySpan]] | None = None,
    *,
    workers: int = 1,
) -> tuple[int, int]:
    """Number of files and of bytes that all videos, or the rallies of each match, need.

    The lengths are those that containers declare or rallies have. With ``settings.pack`` the bytes include the separate
    files of the largest video, which exist while it is packed. With skeletons of rallies they include the frames of
    one rally per worker at source resolution, which exist during the estimation.
    """
    files = num_bytes = largest = 0
    spooled = [0]
    for name, path in videos.items():
        header = read_header(path)
        if 0 in header.frame_size:
            continue
        declared = header.frames if settings.fps is None else round(header.seconds * settings.fps)
        counts = [declared] if rallies is None else [span.stop - span.start for span in rallies[name]]
        height, width = settings.placement(header.frame_size).stored
        for count in filter(None, counts):
            per_kind = 1 if settings.pack else count
            files += per_kind
            size = round(count * height * width * JPEG_BYTES_PER_PX)
            if settings.flow != "none":
                files += per_kind
                size += count * 2 * height * width * np.dtype(settings.flow_dtype).itemsize
            num_bytes += size
            largest = max(largest, size)
        if rallies is not None and settings.skeleton != "none":
            spooled.append(max(counts) * 3 * header.frame_size[0] * header.frame_size[1])
    return files, num_bytes + sum(sorted(spooled)[-workers:]) + (largest if settings.pack else 0)


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


def prepare_all(
    videos: Mapping[str, Path],
    output: Path,
    settings: Settings,
    *,
    workers: int,
    progress: Callable[[list[PrepareResult]], None],
    rallies: Mapping[str, Sequence[RallySpan]] | None = None,
) -> list[PrepareResult]:
    """Prepare every video, then write `unlabel.json` and `provenance.json` for all complete videos in `output`.

    With `rallies`, the rallies of each match, sorted by their start, are cut out of the match's video. A video that
    cannot be prepared gets an error in its `PrepareResult`; the other videos are still prepared. `progress` gets the
    results of a video or match.

    Raises:
        PoseError: the pose network is not installed or cannot be loaded.
    """
    source = settings.skeleton_source
    source.check()  # raises here once, instead of in the worker of each video
    start = functools.partial(source.start_worker, min(workers, len(videos)))
    output.mkdir(parents=True, exist_ok=True)
    results = []
    with process_pool(workers, initializer=start) as pool:
        jobs = {
            pool.submit(_prepare, name, path, output, settings, None if rallies is None else rallies[name]): name
            for name, path in videos.items()
        }
        for job in as_completed(jobs):
            try:
                found = job.result()
            except BrokenProcessPool:  # killed from outside, out of memory, or a decoder that crashed
                name = jobs[job]
                names = [name] if rallies is None else [span.name for span in rallies[name]]
                message = "a worker process exited; rerun with --workers 1 to find the video that causes it"
                found = [PrepareResult(name, None, message) for name in names]
            results += found
            progress(found)
    write_annotations(output)
    return sorted(results, key=lambda r: r.video)


def _prepare(
    name: str, path: Path, output: Path, settings: Settings, spans: Sequence[RallySpan] | None
) -> list[PrepareResult]:
    if spans is None:
        return [prepare_video(name, path, output, settings)]
    return prepare_match(path, spans, output, settings)


class _Preparation:
    """Preparation of one video or rally: `start`, then `add` for each frame in order, then `finish`.

    `result` is None until the preparation has ended.
    """

    def __init__(self, name: str, source: Path, output: Path, settings: Settings) -> None:
        self.name = name
        self.result: PrepareResult | None = None
        self._source, self._settings = source, settings
        self._files, self._sheet = Outputs.of(name, output), output / SHEET_DIR / f"{name}.jpg"
        self._seconds: list[float] = []
        self._differences: list[float] = []
        self._previous: np.ndarray | None = None
        self._size, self._is_interlaced = (0, 0), False

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Convert an exception to the result."""
        try:
            yield
        except (ValueError, OSError, cv2.error) as error:
            self.fail(str(error))

    def fail(self, message: str) -> None:
        """End with an error."""
        self.result = PrepareResult(self.name, None, message)

    def start(self, record: dict[str, Any]) -> None:
        """Remove outdated files. If an earlier run completed the video, its record is the result."""
        files = self._files
        self._record = record | {"parts": self._settings.by_output()}
        source = self._settings.skeleton_source
        self._record["parts"]["skeleton"] |= source.file_settings(self.name, files.skeleton)
        self._uses_own_frames = files.frames.is_dir() and files.frames.samefile(self._source)
        if self._uses_own_frames:
            _check_own_frames(self._source, self._settings)
        old = remove_outdated(self._source, files, self._record, keep_frames=self._uses_own_frames)
        files.remove_damaged()
        if old.get("complete") and old["parts"] == self._record["parts"] and files.are_complete(old):
            if self._settings.pack:
                files.pack()
            self.result = PrepareResult(self.name, old, None, reused=True)
            return
        files.frames.mkdir(parents=True, exist_ok=True)
        self._has_images = files.frames_zip.exists()
        has_flow = self._settings.flow == "none" or files.packed_flow.exists()
        self._compute_flow = None if has_flow else make_flow_function(self._settings.flow)

    def add(self, frame: Frame) -> None:
        """Write the frame and the flow from the previous frame, if they do not exist."""
        self._size, self._is_interlaced = frame.pixels.shape[:2], frame.is_interlaced
        image = self._settings.placement(self._size).place(frame.pixels)
        is_unchanged = bool(frame.jpeg) and np.array_equal(image, frame.pixels)
        if self._uses_own_frames and not is_unchanged:
            raise VideoError(f"{self._source}: frames of this size are not stored as they are; choose another --output")
        if not self._has_images:
            path = self._files.frames / f"{frame.number:06d}.jpg"
            _write_jpeg(path, image, self._settings.quality, frame.jpeg if is_unchanged else b"")
        gray = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
        if self._previous is not None:
            self._differences.append(float(cv2.absdiff(self._previous, gray).mean()))
            flow_path = self._files.flow / f"pair_{frame.number - 1:05d}.npy"
            if self._compute_flow is not None and not flow_path.exists():
                write_flow(flow_path, self._compute_flow(self._previous, gray), dtype=self._settings.flow_dtype)
        self._previous = gray
        self._seconds.append(frame.seconds)

    def finish(self, read: ReadFrames, fps: float) -> None:
        """Write the skeletons, pack, and complete the record.

        `read` yields the frames again, for the skeletons. `fps` is recorded if the frames have no timestamps.
        """
        settings, record = self._settings, self._record | self._measurements(fps)
        if settings.skeleton != "none":
            place = settings.placement(self._size) if settings.size else None
            counts = settings.skeleton_source.write(self.name, read, self._files.skeleton, self._sheet, place)
            record["skeleton_frames"] = asdict(counts)
        if settings.pack:
            self._files.pack()
        record["complete"] = True
        atomic_write_bytes(self._files.record, json.dumps(record).encode())
        self.result = PrepareResult(self.name, record, None)

    def _measurements(self, fps: float) -> dict[str, Any]:
        seconds = self._seconds
        measured = mean_frame_rate(seconds)
        deviation = max((abs(s - k / measured) for k, s in enumerate(seconds)), default=0.0) if measured else 0.0
        is_irregular = deviation * measured > 0.5  # frames
        return {
            "num_frames": len(seconds),
            "interlaced": self._is_interlaced,
            "fps": measured or fps,
            "largest_timestamp_deviation_s": round(deviation, 6),
            **({"timestamps_s": [round(s, 6) for s in seconds]} if is_irregular else {}),
            "repeated_frames": find_repeated_frames(self._differences),
            "source_size": list(self._size),
            "stored_size": list(self._settings.placement(self._size).stored),
        }

    def invalidate(self) -> None:
        """Mark the record as incomplete, so that the video is in no annotation file."""
        if self._files.record.exists():
            record = json.loads(self._files.record.read_bytes())
            atomic_write_bytes(self._files.record, json.dumps({**record, "complete": False}).encode())


def prepare_video(name: str, path: Path, output: Path, settings: Settings) -> PrepareResult:
    """Prepare one video. Existing files from the same source and settings are kept."""
    cv2.setNumThreads(1)  # the parallelism is over videos
    video = _Preparation(name, path, output, settings)
    with video.errors():
        header = read_header(path)
        video.start(
            {
                "source": path.name,
                "fingerprint": fingerprint(path),
                "container_frame_count": 0 if header.is_estimate else header.frames,
                "hdr": header.hdr,
            }
        )
        if video.result is None:
            for frame in read_frames(path, settings.fps):
                video.add(frame)
            video.finish(lambda: read_frames(path, settings.fps), UNKNOWN_FPS if path.is_dir() else DEFAULT_FPS)
    assert video.result is not None
    return video.result


def prepare_match(path: Path, spans: Sequence[RallySpan], output: Path, settings: Settings) -> list[PrepareResult]:
    """Prepare the rallies of a match, sorted by their start, in one pass over its video.

    The video is decoded from its first to its last frame, unless all rallies are complete. If it cannot be decoded to
    its end, or has another frame rate than annotated, no rally of it is complete.
    """
    cv2.setNumThreads(1)  # the parallelism is over matches
    rallies = {span: _Preparation(span.name, path, output, settings) for span in spans}
    try:
        header = read_header(path)
        if not header.is_estimate:
            check_frame_rate(path, spans, header.fps)
        record = {"source": path.name, "fingerprint": fingerprint(path), "hdr": header.hdr}
        for span, rally in rallies.items():
            with rally.errors():
                rally.start({**record, "match_frames": [span.start, span.stop]})
        pending = {span: rally for span, rally in rallies.items() if rally.result is None}
        if pending:
            output.mkdir(parents=True, exist_ok=True)
            with temporary_folder(str(output)) as folder:
                measured = _cut_rallies(path, pending, Path(folder), needs_spool=settings.skeleton != "none")
            if header.is_estimate:
                check_frame_rate(path, spans, header.fps, measured)
    except (ValueError, OSError, cv2.error) as error:
        for rally in rallies.values():
            rally.fail(str(error))
            rally.invalidate()
    return [rally.result for rally in rallies.values() if rally.result is not None]


def _cut_rallies(path: Path, rallies: Mapping[RallySpan, _Preparation], folder: Path, *, needs_spool: bool) -> float:
    """Decode a match and give each rally its frames. A rally beyond the end of the match fails.

    Returns:
        The mean frame rate of the match.
    """
    needed = {number for span in rallies for number in range(span.start, span.stop)}
    spools = {span: FrameSpool(folder / f"{number}.raw") for number, span in enumerate(rallies)}
    waiting, count = deque(rallies), 0
    times: list[float] = []
    active: list[RallySpan] = []
    starts: dict[RallySpan, float] = {}  # seconds
    for frame in decode_frames(path, needed.__contains__):
        count = frame.number + 1
        times.append(frame.seconds)
        while waiting and waiting[0].start <= frame.number:
            active.append(waiting.popleft())
            starts[active[-1]] = frame.seconds
        for span in active:
            rally = rallies[span]
            with rally.errors():
                rally.add(replace(frame, number=frame.number - span.start, seconds=frame.seconds - starts[span]))
                if needs_spool:
                    spools[span].add(frame.pixels)
                if count == span.stop:
                    rally.finish(spools[span].read, span.fps)
            if rally.result is not None:
                spools[span].remove()
        active = [span for span in active if rallies[span].result is None]
    for span in [*active, *waiting]:
        rallies[span].fail(
            f"{path}: {span.name} ends at frame {span.stop}, but the video has {format_count(count, 'frame')}; get the "
            "video that was annotated, or correct the annotation"
        )
    return mean_frame_rate(times)


def _check_own_frames(folder: Path, settings: Settings) -> None:
    """Raise `VideoError` if `folder`, the source and the output folder of the frames, cannot stay as it is."""
    if any(path.name != f"{number:06d}.jpg" for number, path in enumerate(list_frames(folder))):
        raise VideoError(f"{folder}: the files are not named 000000.jpg, 000001.jpg, ...; choose another --output")
    if settings.pack:
        raise VideoError(f"{folder}: --pack would remove these files; omit it, or choose another --output")


def _write_jpeg(path: Path, image: np.ndarray, quality: int, data: bytes) -> None:
    """Write an image, or the file `data` that contains it."""
    if path.exists():
        return
    if data:
        atomic_write_bytes(path, data)
        return
    success, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not success:
        raise ValueError(f"{path}: OpenCV cannot encode this image as JPEG")
    atomic_write_bytes(path, encoded.tobytes())


def write_annotations(output: Path) -> list[Rally]:
    """Write `unlabel.json`, with each complete video in `output` as a rally without events, and `provenance.json`."""
    folder = output / RECORD_DIR
    paths = sorted(folder.rglob("*.json"))
    found = {path.relative_to(folder).with_suffix("").as_posix(): json.loads(path.read_bytes()) for path in paths}
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
        "match_frames": "of a rally: frame k is frame match_frames[0] + k of the source",
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
