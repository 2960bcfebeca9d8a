"""Which rallies to label next, and how much the selection improves event spotting compared with a random one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmdistill import builders
from mmdistill.config import DistillConfig
from mmdistill.console import progress
from mmdistill.data.annotations.base import Rally
from mmdistill.distributed.device import resolve_precision
from mmdistill.distributed.process import start_process
from mmdistill.errors import format_count
from mmdistill.evaluation.frame_features import FrameEncoder, write_frame_features
from mmdistill.evaluation.networks import load_network
from mmdistill.evaluation.report.tables import Table, table_console
from mmdistill.evaluation.spotting import TABLE_DELTA, select_labeled, spotting_metrics
from mmdistill.fewshot.errors import FewshotError
from mmdistill.fewshot.rally_selection import select_rallies
from mmdistill.fewshot.scores import mean_with_interval
from mmdistill.fewshot.spotting_head import FrameFeatures, LabelElements, SpottingHead
from mmdistill.randomness import seeded_rng

METRIC = f"f1_strict@{TABLE_DELTA}/label"
RULES = {"k-center": "#0072B2", "random": "#999999"}  # colors of the curve


class RallyFeatures:
    """Per-frame features of rallies, which are kept in a folder.

    Args:
        config: dataset, precision and device.
        checkpoint: file or directory.
        component: network of the checkpoint; None: the student, or the only encoder.
        folder: folder of the features; see `write_frame_features`.
        stride: frames between windows.
    """

    def __init__(
        self, config: DistillConfig, checkpoint: str, *, component: str | None, folder: Path, stride: int
    ) -> None:
        self._config, self._folder, self._stride = config, folder, stride
        self._device = start_process(accelerator=config.accelerator, seed=config.seed).device
        self._network = load_network(checkpoint, component=component, data=config.data_module)

    def read(self, rallies: Sequence[Rally]) -> FrameFeatures:
        """(T, D) of each rally; encodes those that have no file. Rallies shorter than a window are left out."""
        encoder = FrameEncoder(
            [self._network],
            rallies,
            self._config.data_module,
            stride=self._stride,
            device=self._device,
            precision=resolve_precision(self._config.precision, self._device),
        )
        if line := encoder.describe_too_short():
            print(line)
        write_frame_features(
            encoder, self._folder, batch_size=self._config.batch_size, num_workers=self._config.num_workers
        )
        return {video: np.load(self._folder / f"{video}.npy") for video in encoder.videos}


def unlabeled_rallies(config: DistillConfig, labeled: Sequence[Rally]) -> list[Rally]:
    """The training rallies of the dataset that are neither labeled nor in the evaluation file.

    Raises:
        FewshotError: there is none.
    """
    data = config.data_module
    builders.make_demo_data(data)
    rallies = builders.load_rallies(data, builders.resolve_annotation_path(data, training=True))
    evaluated = builders.load_rallies(data, builders.resolve_annotation_path(data, training=False))
    excluded = {rally.video for rally in (*evaluated, *labeled)}
    found = [rally for rally in rallies if rally.video not in excluded]
    if not found:
        raise FewshotError(
            f"all of {format_count(len(rallies), 'training rally')} are labeled or in fewshot_eval_json_path; add "
            "rallies to unlabel_json_path"
        )
    return found


@dataclass(frozen=True)
class LabelCurve:
    """F1 of the labels against the number of labels, for the k-center selection and a random one.

    Attributes:
        budgets: numbers of labeled rallies.
        labels: numbers of labeled events, by rule; one list per budget with one value per draw.
        scores: `METRIC` in percent, by rule; in the same order.
        held_out: rallies that are evaluated in each draw.
    """

    budgets: list[int]
    labels: dict[str, list[list[int]]]
    scores: dict[str, list[list[float]]]
    held_out: int

    def rows(self) -> list[dict[str, float]]:
        """One row per budget.

        Keys: ``rallies``; ``labels_RULE``, ``RULE`` and ``RULE_ci95`` of both rules; the paired ``difference``
        (k-center minus random) and ``difference_ci95``.
        """
        rows = []
        for i, budget in enumerate(self.budgets):
            row: dict[str, float] = {"rallies": budget}
            values = {rule: np.array(self.scores[rule][i]) for rule in RULES}
            for rule, found in values.items():
                row[f"labels_{rule}"] = float(np.mean(self.labels[rule][i]))
                row[rule], _, _, row[f"{rule}_ci95"] = mean_with_interval(found)
            difference = values["k-center"] - values["random"]
            row["difference"], _, _, row["difference_ci95"] = mean_with_interval(difference)
            rows.append(row)
        return rows

    def to_json(self) -> dict[str, Any]:
        """All values."""
        return {
            "metric": METRIC,
            "unit": "percent",
            "held_out_rallies": self.held_out,
            "rows": self.rows(),
            "labels": self.labels,
            "values": self.scores,
        }


def label_curve(features: FrameFeatures, rallies: Sequence[Rally], *, draws: int, seed: int) -> LabelCurve:
    """Spot events with 1, 2, 4, ... labeled rallies that are selected by k-center or at random.

    Each draw divides the rallies into two halves: candidates, and rallies that are evaluated. Both rules start with
    the same random rally and use the same evaluated rallies.

    Args:
        features: (T, D) of every rally.
        rallies: with labeled events.
        draws: at least 2.
        seed: seed of the draws and the heads.

    Raises:
        FewshotError: fewer than 4 rallies or 2 draws.
    """
    events = {rally.video: rally.events for rally in rallies if rally.video in features}
    half = len(events) // 2
    if half < 2 or draws < 2:
        raise FewshotError(f"the curve needs at least 4 labeled rallies and 2 draws; found {len(events)} and {draws}")
    budgets = [2**i for i in range(half.bit_length()) if 2**i < half] + [half]
    labels: dict[str, list[list[int]]] = {rule: [[] for _ in budgets] for rule in RULES}
    scores: dict[str, list[list[float]]] = {rule: [[] for _ in budgets] for rule in RULES}
    elements = LabelElements.of([event.label for found in events.values() for event in found])
    with progress("label curve", draws * len(RULES) * len(budgets)) as advance:
        for draw in range(draws):
            names = sorted(events)
            order = [names[i] for i in seeded_rng(seed, "label curve", draw).permutation(len(names))]
            candidates, truth = order[:half], {video: events[video] for video in order[half:]}
            by_rule = {
                "k-center": select_rallies({video: features[video] for video in candidates}, half, first=order[0]),
                "random": candidates,
            }
            for rule, selected in by_rule.items():
                for i, budget in enumerate(budgets):
                    support = {video: events[video] for video in selected[:budget]}
                    head = SpottingHead(features, support, seed=seed + draw)
                    found = {video: head.predict(features[video]) for video in truth}
                    labels[rule][i].append(sum(map(len, support.values())))
                    scores[rule][i].append(spotting_metrics(truth, found, elements)[METRIC])
                    advance(1)
    return LabelCurve(budgets, labels, scores, len(events) - half)


def read_evaluation_rallies(config: DistillConfig) -> list[Rally]:
    """The rallies of the evaluation file with labeled events, with the label fields of the dataset."""
    data = config.data_module
    rallies = builders.load_rallies(data, builders.resolve_annotation_path(data, training=False))
    return select_labeled(rallies, data.label_fields)


def print_curve(curve: LabelCurve) -> None:
    """Print one row per budget."""
    draws = format_count(len(curve.scores["random"][0]), "draw")
    rows = [
        (
            f"{row['rallies']:.0f}",
            *(f"{row[f'labels_{rule}']:.1f}" for rule in RULES),
            *(f"{row[rule]:.1f} ± {row[f'{rule}_ci95']:.1f}" for rule in RULES),
            f"{row['difference']:+.1f} ± {row['difference_ci95']:.1f}",
        )
        for row in curve.rows()
    ]
    columns = ("labeled rallies", *(f"labels {rule}" for rule in RULES), *RULES, "Δ")
    title = f"label F1 strict, {format_count(curve.held_out, 'evaluated rally')}, {draws}"
    table_console().print(Table(title, columns, rows, num_names=1).as_rich())
    print("± is half of the 95 % confidence interval over draws. Δ is k-center minus random, paired over draws.")


def plot_curve(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Write the curve with its 95 % intervals as an image."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    ax = figure.subplots()
    for rule, color in RULES.items():
        x, y, spread = (np.array([row[key] for row in rows]) for key in (f"labels_{rule}", rule, f"{rule}_ci95"))
        ax.plot(x, y, marker="o", color=color, label=rule)
        ax.fill_between(x, y - spread, y + spread, color=color, alpha=0.2, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_xlabel("labeled events")
    ax.set_ylabel(f"label F1 (strict, δ = {TABLE_DELTA}), %")
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, title="selected rallies")
    figure.savefig(path, dpi=120)
