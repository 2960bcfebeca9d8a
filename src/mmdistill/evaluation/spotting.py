"""Few-shot event spotting: a temporal head on frozen per-frame features, trained on a few labeled rallies.

Each draw selects K labeled rallies. The head of every network is trained on these and predicts the events of all other
rallies; see `mmdistill.fewshot.spotting` for the metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdistill import builders
from mmdistill.checkpoint import open_checkpoint
from mmdistill.config import DistillConfig
from mmdistill.console import progress
from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.annotations.f3set import select_fields, to_json
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import start_process
from mmdistill.errors import format_count, suggest_nearest
from mmdistill.evaluation.frame_features import FrameEncoder
from mmdistill.evaluation.networks import load_networks
from mmdistill.evaluation.report.tables import Table, table_console
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.scores import mean_with_interval
from mmdistill.fewshot.spotting import (
    FALSE_POSITIVE_RULES,
    EventLists,
    SpottedEvent,
    average_precisions,
    edit_score,
    f1_scores,
)
from mmdistill.fewshot.spotting_head import FrameFeatures, LabelElements, SpottingHead, confident
from mmdistill.randomness import seeded_rng

DELTAS = (0, 1, 2, 4)  # frames
TABLE_DELTA = 1  # of the F1 scores in the table, as in F3Set
COLUMNS = {  # title in the table -> metric
    "event F1": f"f1_strict@{TABLE_DELTA}/event",
    "element F1": f"f1_strict@{TABLE_DELTA}/elements",
    "label F1 strict": f"f1_strict@{TABLE_DELTA}/label",
    "label F1 published": f"f1_published@{TABLE_DELTA}/label",
    "edit": "edit",
    **{f"mAP@{delta}": f"map@{delta}" for delta in DELTAS},
}
NOTES = (
    f"F1 has a tolerance of {TABLE_DELTA} frame, mAP one of N frames in mAP@N. All values are percentages.",
    "event F1 ignores labels; element F1 is the mean over the elements of the labels. Both use the strict rule.",
    "strict: a wrong label is a false positive. published: only if no event is near, as F3Set's code counts.",
    "± is half of the 95 % confidence interval over draws. Δ is the scored network minus this one, paired over draws.",
)


@dataclass(frozen=True)
class SpottingProtocol:
    """Settings of the draws.

    Attributes:
        shots: K, labeled rallies per draw.
        draws: number of draws.
        seed: seed of the draws and the heads.
        named: the labeled rallies; with them there is one draw. None: drawn at random.
    """

    shots: int = 10
    draws: int = 10
    seed: int = 0
    named: tuple[str, ...] | None = None

    def labeled_rallies(self, videos: Sequence[str]) -> list[tuple[str, ...]]:
        """The labeled rallies of each draw.

        Raises:
            FewshotError: a named rally does not exist, or no rally is left for the evaluation.
        """
        unknown = sorted(set(self.named or ()) - set(videos))
        if unknown:
            raise FewshotError(
                f"no labeled rally {unknown[0]} with frames for a window{suggest_nearest(unknown[0], videos)}"
            )
        shots = len(self.named) if self.named else self.shots
        if not 1 <= shots < len(videos):
            raise FewshotError(
                f"{shots} of {format_count(len(videos), 'rally')} with labels are selected as labeled rallies; select "
                f"between 1 and {len(videos) - 1}, so that at least one is left for the evaluation"
            )
        if self.named:
            return [self.named]
        ordered = sorted(videos)
        rngs = (seeded_rng(self.seed, "spotting", draw) for draw in range(self.draws))
        return [tuple(ordered[i] for i in sorted(rng.choice(len(ordered), shots, replace=False))) for rng in rngs]


@dataclass(frozen=True)
class SpottingResults:
    """Results of all draws.

    Attributes:
        labeled: the labeled rallies of each draw.
        metrics: values in percent by network, the scored network first, then by metric; one value per draw.
        predictions: candidates of the scored network in the first draw, by rally that is not labeled in this draw.
    """

    labeled: list[tuple[str, ...]]
    metrics: dict[str, dict[str, list[float]]]
    predictions: dict[Rally, list[SpottedEvent]]

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """Values by network and metric.

        Keys: ``mean``; with several draws ``ci95`` (half of the 95 % interval, Student's t); of all networks but the
        scored one also ``difference`` (scored minus this network, paired over draws) and ``difference_ci95``.
        """
        scored = next(iter(self.metrics.values()))
        summary: dict[str, dict[str, dict[str, float]]] = {}
        for network, metrics in self.metrics.items():
            rows = summary[network] = {}
            for name, values in metrics.items():
                row = rows[name] = _mean("", values)
                if metrics is not scored:
                    row |= _mean("difference", [a - b for a, b in zip(scored[name], values, strict=True)])
        return summary


def _mean(name: str, values: list[float]) -> dict[str, float]:
    key, prefix = (name, f"{name}_") if name else ("mean", "")
    if len(values) == 1:
        return {key: values[0]}
    mean, _, _, ci95 = mean_with_interval(np.array(values))
    return {key: mean, f"{prefix}ci95": ci95}


def spot(config: DistillConfig, checkpoint: str, protocol: SpottingProtocol, *, stride: int) -> SpottingResults:
    """Encode the evaluation rallies with the scored network and the baselines, and evaluate all draws.

    Raises:
        InputError: the message names the key or the file.
    """
    data = config.data_module
    process = start_process(accelerator=config.accelerator, seed=config.seed)
    builders.make_demo_data(data)
    networks, lines = load_networks(config, open_checkpoint(checkpoint))
    rallies = builders.load_rallies(data, builders.resolve_annotation_path(data, training=False))
    rallies = select_labeled(rallies, data.label_fields)
    features: dict[str, dict[str, NDArray[np.float32]]] = {network.name: {} for network in networks}
    for modality in dict.fromkeys(network.modality for network in networks):
        encoder = FrameEncoder(
            [network for network in networks if network.modality == modality],
            rallies,
            data,
            stride=stride,
            device=process.device,
            precision=resolve_precision(config.precision, process.device),
        )
        lines.append(encoder.describe_too_short())
        for video, found in encoder.encode(batch_size=config.batch_size, num_workers=config.num_workers):
            for network, x in zip(encoder.networks, found, strict=True):
                features[network.name][video] = x
    for line in dict.fromkeys(filter(None, lines)):
        print(line)
    complete = set.intersection(*(set(by_video) for by_video in features.values()))
    return evaluate_spotting(features, [rally for rally in rallies if rally.video in complete], protocol)


def select_labeled(rallies: Sequence[Rally], fields: Sequence[str] | None) -> list[Rally]:
    """The rallies with labeled events. Labels consist of `fields` (None: all).

    Raises:
        FewshotError: only a part of the events of a rally has labels, or no rally has labels.
    """
    found = []
    for rally in rallies:
        missing = [event.frame for event in rally.events if not event.label]
        if missing and len(missing) < len(rally.events):
            raise FewshotError(f"{rally.video}: the event at frame {missing[0]} has no label; add it")
        if rally.events and not missing:
            events = tuple(replace(event, label=select_fields(event.label, fields)) for event in rally.events)
            found.append(replace(rally, events=events))
    if not found:
        raise FewshotError("no rally has labeled events; give annotations with labels in fewshot_eval_json_path")
    return found


def evaluate_spotting(
    features: Mapping[str, FrameFeatures], rallies: Sequence[Rally], protocol: SpottingProtocol
) -> SpottingResults:
    """Train and evaluate a head per network and draw.

    Args:
        features: of each network, the scored one first, for every rally.
        rallies: with labeled events.
        protocol: the draws.

    Raises:
        FewshotError: see `SpottingProtocol.labeled_rallies`.
    """
    events = {rally.video: rally.events for rally in rallies}
    labeled = protocol.labeled_rallies(list(events))
    elements = LabelElements.of([event.label for found in events.values() for event in found])
    metrics: dict[str, dict[str, list[float]]] = {network: {} for network in features}
    predictions: dict[Rally, list[SpottedEvent]] = {}
    with progress("spotting", len(labeled) * len(features)) as advance:
        for draw, support in enumerate(labeled):
            truth = {video: found for video, found in events.items() if video not in support}
            for network, by_video in features.items():
                head = SpottingHead(by_video, {video: events[video] for video in support}, seed=protocol.seed + draw)
                found = {video: head.predict(by_video[video]) for video in truth}
                predictions = predictions or {r: found[r.video] for r in rallies if r.video in found}
                for name, value in spotting_metrics(truth, found, elements).items():
                    metrics[network].setdefault(name, []).append(value)
                advance(1)
    return SpottingResults(labeled, metrics, predictions)


def spotting_metrics(
    truth: EventLists, candidates: Mapping[str, Sequence[SpottedEvent]], elements: LabelElements
) -> dict[str, float]:
    """All metrics in percent. F1 and the edit score use the candidates with an event score of at least 0.5.

    Keys: ``f1_RULE@DELTA/TARGET``, where TARGET is ``event`` (any label), ``label``, the name of an element, or
    ``elements`` (mean over the elements); ``edit``; ``map@DELTA``.
    """
    predicted = {video: confident(found) for video, found in candidates.items()}
    metrics: dict[str, float] = {}
    for target in ("event", "label", *elements.names):
        pair = [_with_target(events, target, elements) for events in (truth, predicted)]
        for rule in FALSE_POSITIVE_RULES:
            for delta in DELTAS:
                scores = f1_scores(pair[0], pair[1], delta=delta, rule=rule)
                metrics[f"f1_{rule}@{delta}/{target}"] = float(np.mean(list(scores.values())))
    for rule in FALSE_POSITIVE_RULES:
        for delta in DELTAS:
            values = [metrics[f"f1_{rule}@{delta}/{name}"] for name in elements.names]
            metrics[f"f1_{rule}@{delta}/elements"] = float(np.mean(values))
    metrics["edit"] = edit_score(truth, predicted)
    for delta in DELTAS:
        precisions = average_precisions(truth, candidates, delta=delta)
        metrics[f"map@{delta}"] = float(np.mean(list(precisions.values())))
    return metrics


def _with_target(events: EventLists, target: str, elements: LabelElements) -> dict[str, list[Event]]:
    """The events with a label that consists of `target` only; see `spotting_metrics`."""

    def select(label: str) -> str:
        if target in elements.names:
            return elements.split(label)[elements.names.index(target)]
        return label if target == "label" else target

    return {video: [Event(e.frame, select(e.label)) for e in found] for video, found in events.items()}


def results_json(results: SpottingResults) -> dict[str, Any]:
    """All metrics as plain values: the summary, the values of each draw, and the labeled rallies of each draw."""
    return {
        "unit": "percent",
        "networks": results.summary(),
        "values": results.metrics,
        "labeled": [list(videos) for videos in results.labeled],
    }


def predictions_json(results: SpottingResults) -> list[dict[str, Any]]:
    """The predicted events as F3Set annotations. Each event has the additional key ``score``."""
    entries = to_json([replace(r, events=tuple(confident(found))) for r, found in results.predictions.items()])
    for entry, found in zip(entries, results.predictions.values(), strict=True):
        for event, prediction in zip(entry["events"], confident(found), strict=True):
            event["score"] = round(prediction.score, 6)
    return entries


def print_results(results: SpottingResults) -> None:
    """Print the main metrics of all networks, and the differences to the scored network."""
    summary = results.summary()
    draws = format_count(len(results.labeled), "draw")
    title = f"event spotting: {format_count(len(results.labeled[0]), 'labeled rally')}, {draws}"
    rows = [
        (network, *(_cell(metrics[name], "mean", "ci95") for name in COLUMNS.values()))
        for network, metrics in summary.items()
    ]
    rows += [
        (f"Δ {network}", *(_cell(metrics[name], "difference", "difference_ci95") for name in COLUMNS.values()))
        for network, metrics in list(summary.items())[1:]
    ]
    table_console().print(Table(title, ("network", *COLUMNS), rows, num_names=1).as_rich())
    for note in NOTES:
        print(note)


def _cell(row: Mapping[str, float], key: str, interval: str) -> str:
    value = f"{row[key]:+.1f}" if key == "difference" else f"{row[key]:.1f}"
    return f"{value} ± {row[interval]:.1f}" if interval in row else value
