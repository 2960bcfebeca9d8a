"""Rows of the evaluation as text: percent, with 95 % intervals."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mmdistill.fewshot.protocol import Results, Row


def difference_to_first(results: Results, row: Row) -> dict[str, Any] | None:
    """The paired difference scored network - this row's network in its combination; None for the scored network."""
    setting = ("n_way", "k_shot", "classifier")
    scored = results.features[0]
    for d in results.differences:
        same = all(d[key] == row.summary[key] for key in setting)
        first = (d["first"], d["first_input_mode"]) == (scored.network, scored.input_mode)
        if same and first and (d["second"], d["second_input_mode"]) == (row.network, row.input_mode):
            return d
    return None


def tables(results: Results) -> list[Table]:
    """One table per combination and head; accuracies in percent with their 95 % intervals."""
    out = []
    for n_way, k_shot in results.protocol.combinations():
        for head in results.protocol.heads:
            rows = select(results, n_way, k_shot, head)
            table = Table(title=title_of(rows[0]), title_justify="left", box=SIMPLE_HEAD)  # fits in 80 characters
            for number, name in enumerate(columns(results)):
                if number < 2:
                    table.add_column(name, overflow="fold")  # a name is never cut short
                else:
                    table.add_column(name, justify="right", no_wrap=True)
            for row in rows:
                table.add_row(*row_cells(results, row))
            out.append(table)
    if results.probes:
        out.append(_probe_table(results))
    return out


def select(results: Results, n_way: int, k_shot: int, head: str) -> list[Row]:
    """Rows of one combination and head."""
    wanted = {"n_way": n_way, "k_shot": k_shot, "classifier": head}
    return [row for row in results.rows if all(row.summary[key] == value for key, value in wanted.items())]


def row_cells(results: Results, row: Row) -> tuple[str, ...]:
    """network, input_mode, accuracy ± ci95 (%), std (%), paired difference (%), seconds of encoding"""
    s, d = row.summary, difference_to_first(results, row)
    return (
        row.network,
        row.input_mode,
        f"{100 * s['top1_action_ensemble']:.2f} ± {100 * s['ci95']:.2f}",
        f"{100 * s['top1_action_ensemble_std']:.1f}",
        "" if d is None else f"{100 * d['difference']:+.2f} ± {100 * d['ci95']:.2f}",
        f"{s['seconds']:.1f} s" if "seconds" in s else "",
    )


def title_of(row: Row) -> str:
    """What a table asks."""
    s = row.summary
    asked = f"{s['episodes']} episodes from {s['classes']} classes, {s['q_sample']} queries each"
    return f"{s['n_way']}-way {s['k_shot']}-shot, {s['classifier']}: {asked}"


def columns(results: Results) -> tuple[str, ...]:
    """Headings of `row_cells`; the lead is the paired difference on the same episodes."""
    scored = results.features[0].network
    return "network", "clips\nshown as", "accuracy, %\n± 95 %", "std", f"{scored}\nleads by", "encoding"


def _probe_table(results: Results) -> Table:
    p = results.probes[0]
    title = (
        f"full label set: {p['classes']} classes, {p['train_clips']} clips to train on, {p['test_clips']} to test, %"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    names = ("network", "clips\nshown as", "linear probe", "mean over\nclasses", f"{p['knn_neighbours']}-NN")
    for name in names:
        table.add_column(name, overflow="fold")
    for p in results.probes:
        values = [f"{100 * p[key]:.2f}" for key in ("linear_top1", "linear_macro", "knn_top1")]
        table.add_row(p["network"], p["input_mode"], *values)
    table.add_row("most frequent class", "", f"{100 * results.probes[0]['majority']:.2f}", "", "")
    return table
