"""Labeled strokes as examples: an F3Set JSON file, or a CSV file with the columns ``video``, ``frame``, ``label``."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from mmdistill.console import log_once
from mmdistill.data.annotations.base import (
    UNKNOWN_FPS,
    AnnotationError,
    Event,
    Rally,
    is_safe_name,
    read_json,
    whole_number,
)
from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.errors import format_count, format_first

CSV_COLUMNS = ("video", "frame", "label")


def load_examples(*paths: Path | str) -> list[Rally]:
    """The labeled strokes of files by video. The content of a file decides its format: F3Set JSON, or CSV.

    A CSV file states no length and no frame rate: `num_frames` is 0 and `fps` is `UNKNOWN_FPS`. A video that is in
    several files occurs several times. The log counts the strokes that `mmdistill label` proposed (``source``).

    Raises:
        AnnotationError: a file is invalid, a stroke has no label, or there is no stroke. The message names the line.
    """
    rallies: list[Rally] = []
    for path in paths:
        data = Path(path).read_bytes()
        is_json = data.lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")[:1] in (b"[", b"{")
        found = _load_json(path) if is_json else _load_csv(path, data)
        if unlabeled := [r.video for r in found if any(not event.label for event in r.events)]:
            raise AnnotationError(
                f"{path}: {unlabeled[0]} has a stroke without a label; add the key 'label' to each event"
            )
        rallies += found
    if not any(rally.events for rally in rallies):
        names = format_first(paths, 3)
        raise AnnotationError(f"{names}: there is no labeled stroke; label at least one per label that you need")
    return rallies


def _report_proposals(path: Path | str, sources: Iterable[object]) -> None:
    if count := sum(source == "proposal" for source in sources):
        counted = format_count(count, "proposal")
        log_once(f"{path}: the labels include {counted} of an earlier call (source=proposal); check them first")


def _load_json(path: Path | str) -> list[Rally]:
    rallies = load_f3set(path)
    _report_proposals(path, [event.get("source") for entry in read_json(path) for event in entry["events"]])
    return rallies


def _load_csv(path: Path | str, data: bytes) -> list[Rally]:
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: not a text file ({error}); save it as CSV in UTF-8") from error
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text.lstrip()), delimiter=delimiter)
    columns = [name.strip().lower() for name in next(reader, [])]
    if missing := [name for name in CSV_COLUMNS if name not in columns]:
        raise AnnotationError(
            f"{path}: the first line has no column {', '.join(missing)}; give F3Set JSON, or a CSV file whose first "
            f"line is {','.join(CSV_COLUMNS)}"
        )
    if others := [name for name in columns if name not in (*CSV_COLUMNS, "source")]:
        log_once(f"{path}: ignoring {format_count(len(others), 'column')} ({format_first(others, 5)})")
    events: dict[str, list[Event]] = {}
    num_repeated = 0
    sources = []
    for row in reader:
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        where = f"{path}, line {reader.line_num}"
        if len(cells) != len(columns):
            raise AnnotationError(f"{where}: {format_count(len(cells), 'value')}, but {len(columns)} columns")
        video, number, label = (cells[columns.index(name)] for name in CSV_COLUMNS)
        frame = whole_number(number)
        if not is_safe_name(video):
            raise AnnotationError(f"{where}: video={video!r} is not a file name")
        if frame is None or frame < 0:
            raise AnnotationError(f"{where}: frame={number!r} is not a frame number, which is counted from 0")
        if not label:
            raise AnnotationError(f"{where}: the label is empty")
        sources += [cell for cell, name in zip(cells, columns, strict=True) if name == "source"]
        found = events.setdefault(video, [])
        num_repeated += Event(frame, label) in found
        found += [] if Event(frame, label) in found else [Event(frame, label)]
    if num_repeated:
        log_once(f"{path}: {format_count(num_repeated, 'repeated line')}")
    _report_proposals(path, sources)
    sorted_events = {video: tuple(sorted(found, key=lambda e: e.frame)) for video, found in events.items()}
    return [Rally(video, 0, UNKNOWN_FPS, found) for video, found in sorted_events.items()]
