"""Labels of the strokes of a video, proposed by a temporal head that is trained on a few labeled strokes.

The head of `mmdistill.fewshot.spotting_head` is trained on the known frames of the examples, see
`mmdistill.evaluation.labeled_frames`. It proposes strokes at all other frames of the video.

Shapes: N frames, D width.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mmdistill.console import log_once, progress
from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Event, Rally
from mmdistill.errors import InputError, format_count, format_first
from mmdistill.evaluation.labeled_frames import KNOWN_FRAMES, KNOWN_SECONDS, LabeledFile, locate_examples, video_name
from mmdistill.evaluation.report.frame_images import FrameStore, resize_to_width
from mmdistill.evaluation.video_features import TO_END, Range, VideoEncoder
from mmdistill.fewshot.spotting import SpottedEvent
from mmdistill.fewshot.spotting_head import CONTEXT_FRAMES, MIN_EVENT_SCORE, SpottingHead, confident
from mmdistill.prepare.placement import fit_into
from mmdistill.prepare.rallies import RallySpan, check_frame_rate
from mmdistill.prepare.sources import decode_frames, list_frames, read_header
from mmdistill.prepare.video import mean_frame_rate

FPS_TOLERANCE = 0.02  # relative: motion in videos with 29.97 and 30 fps looks the same
FPS_CHECK_FRAMES = 250  # after which the frame rate is compared for the first time
NUM_NEIGHBORS = 3
THUMBNAIL_WIDTH = 160  # px
DIGITS = 4  # of probabilities and similarities in all outputs

KeepImage = Callable[[int, NDArray[np.uint8]], None]
"""called with each frame number and a small image of the frame, uint8 (h, w, 3) RGB"""


@dataclass(frozen=True)
class Example:
    """A labeled stroke: `frame` of the video `video`, as in the file of the examples; `image` is uint8 (h, w, 3)."""

    video: str
    frame: int
    label: str
    image: NDArray[np.uint8] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Stroke:
    """A stroke of the labeled video.

    Attributes:
        frame, label: as proposed, or as in the examples.
        seconds: time of the frame; None if the frame rate is unknown.
        probability: of a stroke with this label; 1 for an example.
        event_probability: of a stroke with any label.
        alternatives: the most probable labels with their probabilities; the first is `label`.
        neighbors: positions of the most similar examples, and the cosine similarity of their features.
        is_example: whether the stroke is one of the examples.
    """

    frame: int
    label: str
    seconds: float | None
    probability: float
    event_probability: float
    alternatives: tuple[tuple[str, float], ...]
    neighbors: tuple[tuple[int, float], ...]
    is_example: bool = False


@dataclass(frozen=True)
class LabeledVideo:
    """The result for one video.

    Attributes:
        name, path: of the video.
        num_frames, fps: `fps` is `UNKNOWN_FPS` for a folder of frames without an annotated frame rate.
        strokes: in the order of their frames.
        examples: the labeled strokes that the head was trained on.
        num_background: frames without a stroke that the head was trained on.
        caveats: sentences about the limits of the result.
        images: small images of all frames.
    """

    name: str
    path: Path
    num_frames: int
    fps: float
    strokes: list[Stroke]
    examples: list[Example]
    num_background: int
    caveats: list[str]
    images: FrameStore = field(repr=False)


@dataclass(frozen=True)
class LabelingOptions:
    """What the examples mean, and which proposals are kept.

    Attributes:
        folders: where the videos of the examples are searched for.
        complete: whether every stroke of the example rallies is labeled, so that all their other frames show none.
        threshold: smallest probability of a stroke with any label.
        fps: frame rate of a folder of frames, if the examples do not state it.
        seed: seed of the head.
    """

    folders: tuple[Path, ...]
    complete: bool = False
    threshold: float = 0.5
    fps: float = UNKNOWN_FPS
    seed: int = 0


@dataclass
class _Video:
    """What one pass over a file has collected.

    `known` are the known frames, and `parts` the first frame and the features (n, D) of consecutive frames.
    """

    fps: float
    known: list[Range]
    seconds: list[float] = field(default_factory=list)
    parts: list[tuple[int, NDArray[np.float16]]] = field(default_factory=list)

    @property
    def num_frames(self) -> int:
        """Frames that were read."""
        return len(self.seconds)

    def features(self, first: int, end: int) -> NDArray[np.float16]:
        """(end - first, D)."""
        chunks = [x[max(0, first - begin) : max(0, end - begin)] for begin, x in self.parts]
        return np.concatenate(chunks)


@dataclass
class _TrainingSet:
    """Examples, and the known frames with their context by a name of the range, as `SpottingHead` needs them."""

    examples: list[Example] = field(default_factory=list)
    example_features: list[NDArray[np.float16]] = field(default_factory=list)  # (D,) each
    features: dict[str, NDArray[np.float16]] = field(default_factory=dict)
    events: dict[str, list[Event]] = field(default_factory=dict)
    known: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)  # frame rate by name of the file

    def add(self, file: LabeledFile, video: _Video, images: Mapping[int, NDArray[np.uint8]] | FrameStore) -> None:
        """Add the strokes of a file and its known frames."""
        self.rates[video_name(file.path)] = video.fps
        for event, (name, frame) in zip(file.events, file.names, strict=True):
            self.examples.append(Example(name, frame, event.label, images[event.frame]))
            self.example_features.append(video.features(event.frame, event.frame + 1)[0])
        for start, stop in video.known:
            stop = min(stop, video.num_frames)
            first, end = _with_context((start, stop))
            key = f"{file.path} {start}"
            self.features[key] = video.features(first, min(end, video.num_frames))
            self.known[key] = np.zeros(len(self.features[key]), dtype=bool)
            self.known[key][start - first : stop - first] = True
            self.events[key] = [Event(e.frame - first, e.label) for e in file.events if start <= e.frame < stop]

    @property
    def num_background(self) -> int:
        """Known frames without a stroke."""
        return int(sum(known.sum() for known in self.known.values())) - len(self.examples)


def _with_context(known: Range) -> Range:
    first, end = known
    return max(0, first - CONTEXT_FRAMES), end if end == TO_END else end + CONTEXT_FRAMES


def label_video(path: Path, encoder: VideoEncoder, rallies: Sequence[Rally], options: LabelingOptions) -> LabeledVideo:
    """Read the videos of the examples and the video `path`, train a head, and propose strokes.

    Each video is decoded once. Of the video `path` the features of all frames are kept, float16 (N, D), and small
    images in a temporary file.

    Args:
        path: video file, or folder of numbered JPEG files.
        encoder: the network.
        rallies: the examples.
        options: see `LabelingOptions`.

    Raises:
        InputError: a video does not exist or cannot be read, an example lies beyond the end of its video, the frame
            rate differs from the annotated one, or all frames of `path` are known. The message names the video.
    """
    files = locate_examples(rallies, path, options.folders, complete=options.complete)
    own = files.pop(path, LabeledFile(path, UNKNOWN_FPS))
    own.fps = options.fps if own.fps == UNKNOWN_FPS else own.fps
    for file in (*files.values(), own):
        _check_length(file, _declared_length(file.path) or TO_END)
    training, images = _TrainingSet(), FrameStore()
    for file in files.values():
        kept: dict[int, NDArray[np.uint8]] = {}
        training.add(file, _read_video(encoder, file, _keep_examples(file, kept)), kept)
    video = _read_video(encoder, own, lambda _, image: images.append(image), is_whole=True)
    training.add(own, video, images)
    is_known = _covered(video.known, video.num_frames)
    if is_known.all():
        cause = _why_all_is_known(own, video, complete=options.complete)
        raise InputError(f"{path}: the examples leave no frame of this video to label; {cause}")
    head = SpottingHead(training.features, training.events, seed=options.seed, known=training.known)
    proposed = [e for e in head.predict(video.features(0, video.num_frames)) if not is_known[e.frame]]
    given = [SpottedEvent(e.frame, e.label, alternatives=((e.label, 1.0),)) for e in own.events]
    events = sorted([*confident(proposed, options.threshold), *given], key=lambda event: event.frame)
    warnings = _warnings([name for file in (*files.values(), own) for name in file.without_stroke], proposed, options)
    for line in warnings:
        log_once(line)
    return LabeledVideo(
        video_name(path),
        path,
        video.num_frames,
        video.fps,
        _make_strokes(events, given, video, head, training),
        training.examples,
        training.num_background,
        [*warnings, *_caveats(head, training, video.fps, complete=options.complete)],
        images,
    )


def _covered(ranges: Sequence[Range], num_frames: int) -> NDArray[np.bool_]:
    """Whether a frame is in one of the ranges, (num_frames,)."""
    is_covered = np.zeros(num_frames, dtype=bool)
    for first, end in ranges:
        is_covered[first:end] = True
    return is_covered


def _why_all_is_known(file: LabeledFile, video: _Video, *, complete: bool) -> str:
    """The end of the message for a video without a frame that needs a label."""
    near = replace(file, complete=[]).known_ranges(video.fps)
    if _covered(near, video.num_frames).all():
        distance = f"{KNOWN_SECONDS} s" if video.fps > 0 else f"{KNOWN_FRAMES} frames"
        return f"each frame is within {distance} of an example, where no other stroke is searched"
    if complete:
        return "with --complete, do not give it as an example"
    return (
        f"the examples have {format_count(len(file.without_stroke), 'rally')} of it without a stroke "
        f"({format_first(file.without_stroke, 3)}); remove those that are not labeled yet"
    )


def _declared_length(path: Path) -> int:
    """Frames of a folder, or those that a video file declares exactly; 0 if it declares none."""
    if path.is_dir():
        return len(list_frames(path))
    header = read_header(path)
    return 0 if header.is_estimate else header.frames


def _check_length(file: LabeledFile, num_frames: int) -> None:
    for event, (name, frame) in zip(file.events, file.names, strict=True):
        if event.frame >= num_frames:
            raise AnnotationError(
                f"the examples have a stroke at frame {frame} of {name}, but {file.path} ends at frame "
                f"{num_frames - 1}; give the annotated video, or correct the frame (frames count from 0)"
            )


def _check_frame_rate(file: LabeledFile, seconds: Sequence[float]) -> None:
    if not file.path.is_dir():
        span = RallySpan(video_name(file.path), 0, 0, file.fps)
        check_frame_rate(file.path, [span], read_header(file.path).fps, mean_frame_rate(list(seconds)))


def _keep_examples(file: LabeledFile, kept: dict[int, NDArray[np.uint8]]) -> KeepImage:
    frames = {event.frame for event in file.events}

    def keep(frame: int, image: NDArray[np.uint8]) -> None:
        if frame in frames:
            kept[frame] = image

    return keep


def _read_video(encoder: VideoEncoder, file: LabeledFile, keep: KeepImage, *, is_whole: bool = False) -> _Video:
    """Decode a file once: features of its known frames (of all frames with `is_whole`), and an image of each frame."""
    header, is_folder = read_header(file.path), file.path.is_dir()
    fps = file.fps if is_folder else header.fps
    video = _Video(fps, file.known_ranges(fps))
    ranges = [(0, TO_END)] if is_whole else [_with_context(known) for known in video.known]
    total = _declared_length(file.path) or header.frames
    last = TO_END if ranges[-1][1] == TO_END else ranges[-1][1] + encoder.windows.span

    def frames() -> Iterator[NDArray[np.uint8]]:
        placement = None
        for frame in islice(decode_frames(file.path), last):
            placement = placement or fit_into(frame.pixels.shape[:2], encoder.frame_size, "crop")
            image = cv2.cvtColor(placement.place(frame.pixels), cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
            keep(frame.number, resize_to_width(image, min(THUMBNAIL_WIDTH, image.shape[1])))
            video.seconds.append(frame.number / max(fps, 1e-3) if is_folder else frame.seconds)
            if video.num_frames == FPS_CHECK_FRAMES:
                _check_frame_rate(file, video.seconds)
            advance(1)
            yield image

    with progress(f"encoding {file.path.name}", min(total, last)) as advance:
        for first, features in encoder.encode(str(file.path), frames(), ranges):
            video.parts.append((first, features.astype(np.float16)))
    _check_length(file, video.num_frames)
    _check_frame_rate(file, video.seconds)
    if not is_folder:
        video.fps = mean_frame_rate(video.seconds) or UNKNOWN_FPS
    if is_whole:
        video.known = file.known_ranges(video.fps)
        video.parts = [(0, np.concatenate([features for _, features in video.parts]))]
    return video


def _make_strokes(
    events: Sequence[SpottedEvent],
    given: Sequence[SpottedEvent],
    video: _Video,
    head: SpottingHead,
    training: _TrainingSet,
) -> list[Stroke]:
    """The strokes with times and neighbors; `given` are the events that are the last examples of `training`."""
    if not events:
        return []
    own = len(training.examples) - len(given)  # position of the first example of this video
    features = np.concatenate([video.features(event.frame, event.frame + 1) for event in events])
    similarity = _unit(head.normalize(features)) @ _unit(head.normalize(np.stack(training.example_features))).T
    strokes = []
    for event, row in zip(events, similarity, strict=True):
        is_example = any(event is example for example in given)
        order = [
            i
            for i in np.argsort(-row, kind="stable").tolist()
            if not (is_example and i >= own and training.examples[i].frame == event.frame)
        ]
        strokes.append(
            Stroke(
                event.frame,
                event.label,
                round(video.seconds[event.frame], 3) if video.fps > 0 else None,
                round(event.score, DIGITS),
                round(event.event_score, DIGITS),
                tuple((label, round(probability, DIGITS)) for label, probability in event.alternatives),
                tuple((i, round(float(row[i]), DIGITS)) for i in order[:NUM_NEIGHBORS]),
                is_example,
            )
        )
    return strokes


def _unit(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1."""
    unit: NDArray[np.float32] = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    return unit


def _warnings(without_stroke: Sequence[str], proposed: Sequence[SpottedEvent], options: LabelingOptions) -> list[str]:
    """Sentences about examples that may be a mistake, and about a result without proposals."""
    lines = []
    if without_stroke:
        lines.append(
            f"The examples without a stroke include {format_count(len(without_stroke), 'rally')} with an empty list of "
            f"events: {format_first(without_stroke, 3)}. Remove those that are not labeled yet."
        )
    if not confident(proposed, options.threshold):
        highest = max((event.event_score for event in proposed), default=0)
        found = f"the highest event_score is {highest:.4f}" if proposed else f"no event_score reaches {MIN_EVENT_SCORE}"
        lines.append(
            f"No stroke is proposed: {found}, and --threshold is {options.threshold}. Give more examples, or a lower "
            "--threshold."
        )
    return lines


def _caveats(head: SpottingHead, training: _TrainingSet, fps: float, *, complete: bool) -> list[str]:
    """Sentences about the limits of the proposals."""
    counts = Counter(example.label for example in training.examples)
    lines = [
        "The probabilities are outputs of a network that was trained on few examples. They are not calibrated: of the "
        "strokes with probability 0.8, the fraction with a correct label can be much smaller or larger. Use them to "
        "order the strokes.",
        "Only labels of the examples can be proposed, or combinations of the values of their elements. A stroke with "
        "any other label gets one of these.",
    ]
    fixed = [
        f"{name} {values[0]}" for name, values in zip(head.elements.names, head.values, strict=True) if len(values) == 1
    ]
    if fixed:
        lines.append(f"All examples have the same value of {', '.join(fixed)}, so every proposal has it.")
    if rare := sorted(label for label, count in counts.items() if count == 1):
        lines.append(
            f"{len(rare)} of {format_count(len(counts), 'label')} have a single example: {format_first(rare, 8)}. "
            "Proposals of these labels are unreliable."
        )
    if not complete:
        lines.append(
            f"Frames within {KNOWN_SECONDS} s of an example and example rallies without a stroke are the only "
            f"background that the network has seen ({format_count(training.num_background, 'frame')}). It can find "
            "strokes in scenes that look different, such as breaks and replays."
        )
    for name, rate in training.rates.items():
        if rate > 0 and fps > 0 and abs(rate - fps) > FPS_TOLERANCE * fps:
            lines.append(
                f"The examples of {name} have {rate:.4g} frames per second, this video has {fps:.4g}: its motion looks "
                "slower or faster to the network."
            )
    if fps <= 0:
        lines.append("The frame rate of the frames is unknown (--fps), so the strokes have no times.")
    return lines
