"""Tables of the results: accuracies in percent with their 95 % intervals, for the terminal and the page."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.console import Console

from mmdistill.errors import format_count
from mmdistill.fewshot.protocol import Results, Row, Setting, describe_eligibility

COLUMNS = (
    "network",
    "input",
    "accuracy, %\n± 95 %",
    "std, points",
    "Δ vs. row\n(paired), points",
    "encoding\ntime (s)",
)
FOOTNOTES = (
    "± is half of the 95 % confidence interval of the mean over episodes.",
    "std is the standard deviation of the accuracy over episodes.",
    "Δ vs. row (paired) is the accuracy of the scored network minus that of the row on the same episodes, in "
    "percentage points. The row of the scored network shows reference.",
    "Encoding time covers preprocessing and forward passes of all clips. It excludes the warm-up and the reading of "
    "files. For cached features it is the time of their encoding. – means that it is unknown.",
)
_FILE_WIDTH = 160  # characters, if the output is not a terminal
REFERENCE = "reference"  # in the column of the differences, in the row of the scored network
ATTENTIVE_COLUMNS = ("attentive\nprobe", "mean over\nclasses", "training\nclips", "encoding,\ntraining (s)")
PROBE_COLUMNS = ("network", "input", "linear probe", "mean over\nclasses", "k-NN", "most frequent\nclass")


@dataclass(frozen=True)
class Table:
    """A table as text; the first `num_names` columns are names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    networks: tuple[str, ...] = ()  # the network of each row
    num_names: int = 2

    def as_rich(self) -> rich.table.Table:
        """The table for a terminal."""
        found = rich.table.Table(title=self.title, title_justify="left", box=SIMPLE_HEAD)  # fits in 80 characters
        for number, name in enumerate(self.columns):
            if number < self.num_names:
                found.add_column(name, overflow="fold")  # a name is never truncated
            else:
                found.add_column(name, justify="right", no_wrap=True)
        for cells in self.rows:
            found.add_row(*cells)
        return found


def network_label(network: str, input_mode: str, *, default_mode: str) -> str:
    """Name of a curve; the input mode is added if it is not that of the scored network."""
    return network if input_mode == default_mode else f"{network} ({input_mode})"


def table_console() -> Console:
    """Standard output for tables; wide enough for them if it is not a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)


def result_tables(results: Results) -> list[Table]:
    """One table per combination and classifier."""
    return [
        Table(
            table_title(setting.rows[0]),
            COLUMNS,
            [row_cells(setting, row) for row in setting.rows],
            tuple(row.network for row in setting.rows),
        )
        for setting in results.settings
    ]


def row_cells(setting: Setting, row: Row) -> tuple[str, ...]:
    """One row of a table, in the order of `COLUMNS`."""
    s, d = row.summary, setting.difference_to_scored(row)
    return (
        _network_cell(row.network, s.get("modality")),
        row.input_mode,
        f"{100 * s['top1_action_ensemble']:.2f} ± {100 * s['ci95']:.2f}",
        f"{100 * s['top1_action_ensemble_std']:.1f}",
        REFERENCE if d is None else f"{100 * d['difference']:+.2f} ± {100 * d['ci95']:.2f}",
        f"{s['seconds']:.1f}" if "seconds" in s else "–",
    )


def _network_cell(name: str, modality: str | None) -> str:
    """The name of a network with its input modality: ``teacher_flow``, ``random (rgb)``."""
    return name if modality is None or name.endswith(f"_{modality}") else f"{name} ({modality})"


def result_caveats(results: Results) -> list[str]:
    """The lines about excluded classes and about networks below chance."""
    lines = []
    for setting in results.settings:
        episodes = setting.rows[0].scores.episodes
        if episodes.eligibility.excluded:
            lines.append(describe_eligibility(episodes, episodes.eligibility, results.features[0].classes))
    return list(dict.fromkeys(filter(None, (*lines, below_chance_note(results)))))


def below_chance_note(results: Results) -> str:
    """A note about the networks whose 95 % interval is below chance in a table; empty if there are none."""
    names: dict[str, None] = {}
    for row in (row for setting in results.settings for row in setting.rows):
        if row.summary["top1_action_ensemble"] + row.summary["ci95"] < 1 / row.summary["n_way"]:
            names[row.network] = None
    if not names:
        return ""
    note = f"Below chance: {', '.join(names)}."
    if results.features[0].info.get("has_groups") is False:  # the videos of the clips are unknown
        return f"{note} The 95 % interval lies below the chance level."
    cause = (
        " A possible cause: clips of one video look alike and belong to different classes. The support clip that is "
        "most similar to a query clip then often has a wrong class."
    )
    fix = (
        " data_module.disjoint=video (`mmdistill evaluate-features`: --disjoint video) draws support and query clips "
        "from different videos."
    )
    return f"{note}{cause}{'' if results.protocol.disjoint else fix}"


def table_title(row: Row) -> str:
    """N-way K-shot, classifier, and the number of episodes, classes and queries."""
    s = row.summary
    sizes = (
        f"{format_count(s['episodes'], 'episode')} from {format_count(s['classes'], 'class')}, "
        f"{format_count(s['q_sample'], 'query')} per class"
    )
    return f"{s['n_way']}-way {s['k_shot']}-shot, {s['classifier']}: {sizes}"


def probe_tables(results: Results) -> list[Table]:
    """The table of the full label set, if the probes were computed."""
    if not results.probes:
        return []
    p = results.probes[0]
    title = (
        f"Full label set: {format_count(p['classes'], 'class')}, {format_count(p['train_clips'], 'training clip')}, "
        f"{format_count(p['test_clips'], 'test clip')}, {format_count(p['knn_num_neighbors'], 'neighbor')}, "
        "accuracy in %"
    )
    keys = ("linear_top1", "linear_macro", "knn_top1", "majority")
    has_attentive = any("attentive_top1" in p for p in results.probes)
    rows = [
        (
            _network_cell(p["network"], f.info.get("modality")),
            p["input_mode"],
            *(f"{100 * p[key]:.2f}" for key in keys),
            *(_attentive_cells(p) if has_attentive else ()),
        )
        for p, f in zip(results.probes, results.features, strict=True)
    ]
    columns = (*PROBE_COLUMNS, *(ATTENTIVE_COLUMNS if has_attentive else ()))
    return [Table(title, columns, rows, tuple(p["network"] for p in results.probes))]


def _attentive_cells(probe: Mapping[str, Any]) -> tuple[str, ...]:
    """Accuracies and times in the order of `ATTENTIVE_COLUMNS`. The tokens are those of whole clips in each row."""
    if "attentive_top1" not in probe:
        return ("–",) * len(ATTENTIVE_COLUMNS)
    seconds = f"{probe['attentive_encode_seconds']:.1f}, {probe['attentive_train_seconds']:.1f}"
    accuracies = (probe[f"attentive_{name}"] for name in ("top1", "macro", "train_top1"))
    return (*(f"{100 * accuracy:.2f}" for accuracy in accuracies), seconds)
