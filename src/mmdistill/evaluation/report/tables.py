"""Tables of the results: accuracies in percent with their 95 % intervals, for the terminal and the page."""

from collections.abc import Sequence
from dataclasses import dataclass

from mmdistill.errors import format_count
from mmdistill.fewshot.protocol import Results, Row, Setting

COLUMNS = ("network", "input", "accuracy, %\n± 95 %", "std, %", "Δ vs. row\n(paired), %", "encoding\ntime (s)")
FOOTNOTES = (
    "± is half of the 95 % interval of the mean over episodes.",
    "std is the standard deviation of the accuracy over episodes.",
    "Δ vs. row (paired) is the accuracy of the scored network minus that of the row, episode by episode. The scored "
    "network is the reference.",
    "Encoding time covers preprocessing and forward passes of all clips, without reading files. For cached features it "
    "is the time of their encoding. – means that it is unknown.",
)
REFERENCE = "reference"  # in the column of the differences, in the row of the scored network
PROBE_COLUMNS = ("network", "input", "linear probe", "mean over\nclasses", "k-NN", "most frequent\nclass")


@dataclass(frozen=True)
class Table:
    """A table as text; the first two columns are names, the others numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def result_tables(results: Results) -> list[Table]:
    """One table per combination and classifier."""
    return [
        Table(table_title(setting.rows[0]), COLUMNS, [row_cells(setting, row) for row in setting.rows])
        for setting in results.settings
    ]


def row_cells(setting: Setting, row: Row) -> tuple[str, ...]:
    """One row of a table, in the order of `COLUMNS`."""
    s, d = row.summary, setting.difference_to_scored(row)
    return (
        row.network,
        row.input_mode,
        f"{100 * s['top1_action_ensemble']:.2f} ± {100 * s['ci95']:.2f}",
        f"{100 * s['top1_action_ensemble_std']:.1f}",
        REFERENCE if d is None else f"{100 * d['difference']:+.2f} ± {100 * d['ci95']:.2f}",
        f"{s['seconds']:.1f}" if "seconds" in s else "–",
    )


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
    rows = [(p["network"], p["input_mode"], *(f"{100 * p[key]:.2f}" for key in keys)) for p in results.probes]
    return [Table(title, PROBE_COLUMNS, rows)]
