"""Tables of the results: accuracies in percent with their 95 % intervals."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mmdistill.errors import format_count
from mmdistill.fewshot.protocol import Results, Row

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


def difference_to_scored(results: Results, row: Row) -> dict[str, Any] | None:
    """The paired difference of the scored network minus this row's network; None for the scored network."""
    setting = ("n_way", "k_shot", "classifier")
    scored = results.features[0]
    for d in results.differences:
        same = all(d[key] == row.summary[key] for key in setting)
        first = (d["first"], d["first_input_mode"]) == (scored.network, scored.input_mode)
        if same and first and (d["second"], d["second_input_mode"]) == (row.network, row.input_mode):
            return d
    return None


def make_tables(results: Results) -> list[Table]:
    """One table per combination and classifier, and one of the probes."""
    tables = []
    for n_way, k_shot in results.protocol.combinations():
        for classifier in results.protocol.classifiers:
            rows = select_rows(results, n_way, k_shot, classifier)
            table = Table(title=table_title(rows[0]), title_justify="left", box=SIMPLE_HEAD)  # fits in 80 characters
            for number, name in enumerate(COLUMNS):
                if number < 2:
                    table.add_column(name, overflow="fold")  # a name is never truncated
                else:
                    table.add_column(name, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*row_cells(results, row))
            tables.append(table)
    if results.probes:
        table = Table(title=probe_title(results), title_justify="left", box=SIMPLE_HEAD)
        for name in PROBE_COLUMNS:
            table.add_column(name, overflow="fold")
        for cells in probe_rows(results):
            table.add_row(*cells)
        tables.append(table)
    return tables


def select_rows(results: Results, n_way: int, k_shot: int, classifier: str) -> list[Row]:
    """Rows of one combination and classifier."""
    expected = {"n_way": n_way, "k_shot": k_shot, "classifier": classifier}
    return [row for row in results.rows if all(row.summary[key] == value for key, value in expected.items())]


def row_cells(results: Results, row: Row) -> tuple[str, ...]:
    """One row of a table, in the order of `COLUMNS`."""
    s, d = row.summary, difference_to_scored(results, row)
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


def probe_title(results: Results) -> str:
    """Sizes of the full label set."""
    p = results.probes[0]
    return (
        f"Full label set: {format_count(p['classes'], 'class')}, {format_count(p['train_clips'], 'training clip')}, "
        f"{format_count(p['test_clips'], 'test clip')}, {format_count(p['knn_num_neighbors'], 'neighbor')}, "
        "accuracy in %"
    )


def probe_rows(results: Results) -> list[tuple[str, ...]]:
    """Rows of the full label set, in the order of `PROBE_COLUMNS`."""
    keys = ("linear_top1", "linear_macro", "knn_top1", "majority")
    return [
        (str(p["network"]), str(p["input_mode"]), *(f"{100 * float(p[key]):.2f}" for key in keys))
        for p in results.probes
    ]
