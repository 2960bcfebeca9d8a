"""`mmdistill browse`: one page with the clips of a dataset, their labels, and the errors of an evaluation.

The size of the page does not depend on that of the dataset: the pictures and the index have limits in bytes, and the
page states how many clips each of them contains.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmdistill import builders
from mmdistill.config import DataModuleConfig, DistillConfig, as_ints, modality_specs
from mmdistill.console import progress
from mmdistill.data.annotations.f3set import F3SET_FIELDS, select_fields
from mmdistill.data.clips import ClipTable
from mmdistill.errors import format_count
from mmdistill.evaluation.clip_pictures import ClipPictures, clip_table, event_frame, picture_order
from mmdistill.evaluation.repeated_evaluation import RepeatedEvaluation, match_clips, repeat_evaluation
from mmdistill.evaluation.report.templates import render_template
from mmdistill.fewshot.label_counts import LabelCounts, count_labels
from mmdistill.fewshot.query_errors import count_element_errors, find_query_errors, mark_differences
from mmdistill.fewshot.spotting_head import LabelElements
from mmdistill.modalities import STUDENT_MODALITY

MAX_INDEX_BYTES = 3_000_000  # of the index as JSON; enough for 200,000 clips of 20,000 videos
MAX_PICTURE_BYTES = 6_000_000  # of all pictures; those of the errors use at most half of it
WHOLE_LABEL, CLASSES = "whole label", "classes of this config"  # titles of granularities
_SCRIPT = Path(__file__).with_name("report") / "browse.js"
_EPISODE_SIZES = (1, 5), (1, 5, 15)  # K and Q of the statistics, besides those of the config


@dataclass(frozen=True)
class BrowseOptions:
    """What the page contains.

    Attributes:
        split: "eval" or "unlabel", the annotation file of the dataset config.
        modalities: the drawn modalities; None: all of the dataset. ``rgb`` is always drawn.
        clips: the largest number of clips with a picture; `MAX_PICTURE_BYTES` can allow fewer.
        evaluation: ``fewshot.json`` of the evaluation whose errors are shown; None: no errors.
        errors: the largest number of errors.
    """

    split: str = "eval"
    modalities: tuple[str, ...] | None = None
    clips: int = 200
    evaluation: Path | None = None
    errors: int = 24


@dataclass(frozen=True)
class ShownClip:
    """A clip with its picture, a data URI. `label` is the whole label, `event` and `frames` are frame numbers."""

    position: int
    video: str
    event: int
    frames: str
    label: str
    picture: str


class BrowsePage:
    """The page of a dataset.

    Raises:
        InputError: the message names the key or the file.
    """

    def __init__(self, config: DistillConfig, options: BrowseOptions) -> None:
        self.config, self.options, data = config, options, config.data_module
        builders.make_demo_data(data)
        self.dataset = builders.make_clip_dataset(
            replace(data, label_fields=None),
            tuple(dict.fromkeys((STUDENT_MODALITY, *(options.modalities or data.modalities)))),
            training=options.split == "unlabel",
            seed=config.seed,
            masked=True,
        )
        self.table = clip_table(self.dataset)
        self.pictures = ClipPictures(self.dataset, modality_specs(data))
        self.rows = np.asarray(self.table.rows)  # see `ClipTable.rows`
        self.values: list[int] = self.rows[:, 2].tolist()
        classes = self.dataset.index.classes
        self.labels = [classes[value] if value >= 0 else "" for value in self.values]
        self.granularities = label_granularities(self.labels, data)

    def render(self) -> tuple[str, list[str]]:
        """The page as text, and lines that state how many clips its parts contain."""
        options, used, errors = self.options, 0, None
        if options.evaluation is not None:
            errors = self._errors(repeat_evaluation(options.evaluation))
            used = errors["num_bytes"]
        shown = self._clips(MAX_PICTURE_BYTES - used)
        index, num_indexed = make_index(self.table, self.dataset.index.classes)
        script = _SCRIPT.read_text(encoding="utf-8")
        clips, videos = (format_count(len(self.labels), "clip"), format_count(len(np.unique(self.rows[:, 0])), "video"))
        lines = [f"index: {num_indexed} of {clips}, {len(index['videos'])} of {videos}"]
        lines.append(f"pictures: {len(shown)} of {clips}")
        if errors:
            lines.append(
                f"errors: {len(errors['cards'])} of {format_count(errors['num_errors'], 'clip')} with an error"
            )
        text = render_template(
            "browse.html.jinja",
            data=self.config.data_module,
            split=options.split,
            seed=self.config.seed,
            clips=clips,
            videos=videos,
            lines=lines,
            is_complete=num_indexed == len(self.labels),
            num_labels=len(set(self.labels) - {""}),
            report=self.dataset.index.report,
            rows=self.pictures.rows,
            groups=group_by_label(shown),
            counts={label: self.labels.count(label) for label in {clip.label for clip in shown}},
            num_shown=len(shown),
            statistics=self._statistics(),
            errors=errors,
            index=dump_json(index),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
        return text, lines

    def _show(self, i: int, *, only_input: bool = False) -> ShownClip:
        video, event = self.table.videos[self.rows[i, 0]], event_frame(self.dataset, i)
        picture = self.pictures.draw(i, only_input=only_input)
        return ShownClip(i, video, event, self.pictures.describe_frames(i), self.labels[i], picture)

    def _clips(self, num_bytes: int) -> list[ShownClip]:
        """The clips with a picture, in the order of `picture_order`."""
        order = picture_order(self.values, self.config.seed)[: self.options.clips]
        shown: list[ShownClip] = []
        with progress("pictures", len(order)) as advance:
            for i in order:
                clip = self._show(i)
                num_bytes -= len(clip.picture)
                if num_bytes < 0:
                    break
                shown.append(clip)
                advance(1)
        return shown

    def _statistics(self) -> dict[str, Any] | None:
        """Possible episodes by granularity; None if no clip has a label."""
        if not any(self.labels):
            return None
        data = self.config.data_module
        shots = sorted({*_EPISODE_SIZES[0], *as_ints("data_module.k_shot", data.k_shot)})
        queries = sorted({*_EPISODE_SIZES[1], data.q_sample})
        videos = [self.table.videos[number] for number in self.rows[:, 0]]
        rows: list[LabelCounts] = [
            count_labels(title, labels, videos, shots, queries) for title, labels in self.granularities.items()
        ]
        return {"rows": rows, "shots": shots, "queries": queries, "unlabeled": self.labels.count("")}

    def _errors(self, repeated: RepeatedEvaluation) -> dict[str, Any]:
        """The section of the errors. `num_bytes` is the size of its pictures."""
        features, scores = repeated.features, repeated.scores
        positions = match_clips(features, self.dataset, self.granularities.get(CLASSES, self.labels))
        errors = find_query_errors(features.features, scores)
        cards: list[dict[str, Any]] = []
        num_bytes = 0
        for error in errors[: self.options.errors]:
            query = self._show(positions[error.clip], only_input=True)
            neighbors = [self._show(positions[n.clip], only_input=True) for n in error.neighbors]
            num_bytes += sum(len(clip.picture) for clip in (query, *neighbors))
            if num_bytes > MAX_PICTURE_BYTES // 2:
                break
            support = [
                {
                    "clip": clip,
                    "elements": mark_differences(clip.label, query.label),
                    "similarity": neighbor.similarity,
                    "is_true": neighbor.class_value == error.true_class,
                    "is_predicted": neighbor.class_value == error.predicted_class,
                }
                for clip, neighbor in zip(neighbors, error.neighbors, strict=True)
            ]
            true, predicted = (features.classes[value] for value in (error.true_class, error.predicted_class))
            predicted_elements = mark_differences(predicted, true)
            cards.append({"error": error, "query": query, "predicted": predicted_elements, "support": support})
        elements = class_elements(features.classes, self.config.data_module)
        return {
            "network": features.network,
            "content": repeated.content,
            "path": self.options.evaluation,
            "cards": cards,
            "num_errors": len(errors),
            "num_queries": len(np.unique(scores.episodes.query)),
            "elements": count_element_errors(scores, features.classes, elements),
            "num_bytes": num_bytes,
        }


def label_granularities(labels: Sequence[str], data: DataModuleConfig) -> dict[str, list[str]]:
    """The class of each clip by granularity: the whole label, the classes of `data`, and each element alone.

    `labels` are whole labels, or names of videos with ``data.label == "video"``; "" if a clip has none.

    Raises:
        ConfigError: a label does not have the fields of `data.label_fields`.
    """
    if data.label == "video":
        return {"video": list(labels)}
    names = LabelElements.of([label for label in labels if label]).names
    fields: dict[str, Sequence[str] | None] = {WHOLE_LABEL: None}
    if data.label_fields is not None:
        fields[CLASSES] = data.label_fields
    if len(names) > 1:
        fields |= {name: [str(position)] for position, name in enumerate(names)}

    def select(label: str, chosen: Sequence[str] | None) -> str:
        return select_fields(label, chosen) if label else ""

    with builders.raise_as_config_error():
        return {title: [select(label, chosen) for label in labels] for title, chosen in fields.items()}


def class_elements(classes: Sequence[str], data: DataModuleConfig) -> LabelElements:
    """The elements of the classes, with the names of `data.label_fields`."""
    found = LabelElements.of(classes)
    if data.label == "video" or data.label_fields is None or len(found.names) == 1:
        return found
    positions = sorted({int(f) if f.isdecimal() else F3SET_FIELDS.index(f) for f in data.label_fields})
    by_name = any(not f.isdecimal() for f in data.label_fields)  # then the labels have F3Set's fields
    return LabelElements(tuple(F3SET_FIELDS[p] if by_name else f"field_{p}" for p in positions))


def group_by_label(clips: Sequence[ShownClip]) -> dict[str, list[ShownClip]]:
    """The clips of each label, by video and frame; the labels in alphabetical order."""
    groups: dict[str, list[ShownClip]] = {}
    for clip in sorted(clips, key=lambda clip: (clip.label, clip.video, clip.event)):
        groups.setdefault(clip.label, []).append(clip)
    return groups


def make_index(table: ClipTable, classes: Sequence[str]) -> tuple[dict[str, Any], int]:
    """The index of the page, and its number of clips: those of the first videos that `MAX_INDEX_BYTES` allow.

    Keys: `videos`, `labels`, `span` (number of frames from the first to the last one of a clip), and `rows`: for each
    video a flat list with three numbers per clip, the frame of its event, its position in `labels` (-1: no label) and
    its first frame. The clips have the order of `table`.
    """
    rows = np.asarray(table.rows)
    numbers = {-1: -1}  # class -> position in `labels`
    index: dict[str, Any] = {"videos": [], "labels": [], "rows": []}
    count = num_bytes = 0
    for block in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1):
        new = [value for value in dict.fromkeys(block[:, 2].tolist()) if value not in numbers]
        found = numbers | {value: len(index["labels"]) + k for k, value in enumerate(new)}
        flat = [number for _, start, label, _, frame in block.tolist() for number in (frame, found[label], start)]
        video, labels = table.videos[int(block[0, 0])], [classes[value] for value in new]
        num_bytes += len(dump_json([video, *labels, flat]))
        if num_bytes > MAX_INDEX_BYTES:
            break
        numbers, count = found, count + len(block)
        index["videos"].append(video)
        index["labels"] += labels
        index["rows"].append(flat)
    return {**index, "span": (table.num_frames - 1) * table.sampling_rate + 1}, count


def dump_json(value: Any) -> str:
    """JSON that can be the content of a script element: ``<`` is written as its code."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
