"""The files of a labeled video: F3Set JSON, CSV, and a page with a film strip and the nearest examples per stroke.

All three show the strokes of one `LabeledVideo` with the same frames, labels and probabilities.
"""

import csv
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.annotations.f3set import to_json
from mmdistill.errors import format_count
from mmdistill.evaluation.labeling import LabeledVideo, Stroke
from mmdistill.evaluation.report.frame_images import data_uri, encode_jpeg, film_strip, resize_to_width
from mmdistill.evaluation.report.templates import render_template
from mmdistill.files import atomic_write_bytes, encode_json

CSV_COLUMNS = ("video", "time", "frame", "label", "probability", "source")
MAX_PAGE_BYTES = 10_000_000
_STRIP_SECONDS = 0.24  # on each side of the stroke
_STRIP_FRAMES = 3  # on each side of the stroke
_ROW_SECONDS = (10, 30, 60, 120, 300, 600)  # lengths of a row of the timeline
_MAX_ROWS = 24


@dataclass(frozen=True)
class _ImageSize:
    width: int  # px of a frame, at most
    quality: int  # of JPEG


_IMAGE_SIZES = (_ImageSize(160, 80), _ImageSize(112, 65), _ImageSize(80, 55))  # the first that fits in the page


def write_labels(video: LabeledVideo, folder: Path) -> list[Path]:
    """Write ``strokes.json``, ``strokes.csv`` and ``strokes.html``; returns their paths."""
    content = {
        "strokes.json": encode_json(strokes_json(video)),
        "strokes.csv": strokes_csv(video).encode(errors="backslashreplace"),
        "strokes.html": render_label_page(video).encode(),
    }
    for name, data in content.items():
        atomic_write_bytes(folder / name, data)
    return [folder / name for name in content]


def strokes_json(video: LabeledVideo) -> list[dict[str, Any]]:
    """F3Set annotations. Each event also has ``score``, ``event_score``, ``alternatives`` and ``source``."""
    events = tuple(Event(stroke.frame, stroke.label) for stroke in video.strokes)
    entries = to_json([Rally(video.name, video.num_frames, video.fps, events)])
    for event, stroke in zip(entries[0]["events"], video.strokes, strict=True):
        event["score"], event["event_score"] = stroke.probability, stroke.event_probability
        event["alternatives"] = [{"label": label, "score": score} for label, score in stroke.alternatives]
        event["source"] = _source(stroke)
    return entries


def strokes_csv(video: LabeledVideo) -> str:
    """One line per stroke. The file can be corrected and given as a further ``--examples``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for s in video.strokes:
        seconds = "" if s.seconds is None else f"{s.seconds:.3f}"
        writer.writerow([video.name, seconds, s.frame, s.label, f"{s.probability:.4f}", _source(s)])
    return buffer.getvalue()


def _source(stroke: Stroke) -> str:
    return "example" if stroke.is_example else "proposal"


def render_label_page(video: LabeledVideo) -> str:
    """The page as text, with images that are small enough for `MAX_PAGE_BYTES`.

    If the page is still larger, the most probable strokes have no film strip, and the page states this.
    """
    strokes = sorted(video.strokes, key=lambda s: (s.is_example, s.probability, s.frame))
    for size in _IMAGE_SIZES:
        page = _render(video, strokes, size, len(strokes))
        if len(page.encode()) <= MAX_PAGE_BYTES:
            return page
    fixed = len(_render(video, strokes, size, 0).encode())
    share = (0.95 * MAX_PAGE_BYTES - fixed) / (len(page.encode()) - fixed)
    return _render(video, strokes, size, max(0, int(share * len(strokes))))


def _render(video: LabeledVideo, strokes: list[Stroke], size: _ImageSize, num_strips: int) -> str:
    counts = Counter(example.label for example in video.examples)
    proposed = Counter(stroke.label for stroke in strokes if not stroke.is_example)
    shown = sorted({i for stroke in strokes for i, _ in stroke.neighbors})
    images = {
        i: resize_to_width(video.examples[i].image, min(size.width, video.examples[i].image.shape[1])) for i in shown
    }
    return render_template(
        "label.html.jinja",
        video=video,
        length=_format_time(video.num_frames / video.fps) if video.fps > 0 else None,
        strokes=[(stroke, _film(video, stroke, size) if k < num_strips else None) for k, stroke in enumerate(strokes)],
        num_strips=num_strips,
        timeline=_timeline(video),
        labels=[(label, counts[label], proposed[label]) for label in sorted({*counts, *proposed})],
        images={i: (data_uri(encode_jpeg(x, quality=size.quality)), x.shape[1], x.shape[0]) for i, x in images.items()},
        num_example_videos=format_count(len({example.video for example in video.examples}), "video"),
        format_time=_format_time,
    )


def _film(video: LabeledVideo, stroke: Stroke, size: _ImageSize) -> dict[str, Any]:
    """The film strip of a stroke, and its frame numbers."""
    step = max(1, round(_STRIP_SECONDS * video.fps / _STRIP_FRAMES)) if video.fps > 0 else 2
    around = range(stroke.frame - _STRIP_FRAMES * step, stroke.frame + _STRIP_FRAMES * step + 1, step)
    frames = [frame for frame in around if 0 <= frame < video.num_frames]
    images = [video.images[frame] for frame in frames]
    small = [resize_to_width(image, min(size.width, image.shape[1])) for image in images]
    strip = film_strip(small, marked=frames.index(stroke.frame))
    return {"source": data_uri(encode_jpeg(strip, quality=size.quality)), "frames": frames}


def _timeline(video: LabeledVideo) -> list[dict[str, Any]]:
    """Rows of the timeline: texts of start and end, width in percent, and the strokes with their x in percent."""
    fps = video.fps if video.fps > 0 else 1.0  # without a frame rate the axis has frames
    lengths = [round(seconds * fps) for seconds in _ROW_SECONDS]
    length = next((n for n in lengths if n * _MAX_ROWS >= video.num_frames), -(-video.num_frames // _MAX_ROWS))
    length = min(length, video.num_frames)
    rows = []
    for first in range(0, video.num_frames, length):
        end = min(first + length, video.num_frames)
        start_text, end_text = (_format_time(k / fps) if video.fps > 0 else f"frame {k}" for k in (first, end))
        strokes = [(s, 100 * (s.frame - first) / length) for s in video.strokes if first <= s.frame < end]
        rows.append({"start": start_text, "end": end_text, "width": 100 * (end - first) / length, "strokes": strokes})
    return rows


def _format_time(seconds: float) -> str:
    """``0:01:05.360``."""
    milliseconds = round(1000 * seconds)
    return f"{milliseconds // 3_600_000}:{milliseconds // 60_000 % 60:02d}:{milliseconds / 1000 % 60:06.3f}"
