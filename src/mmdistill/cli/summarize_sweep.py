"""Write the results of a sweep as a table (sweep.csv) and a plot (sweep.png), and list the failed jobs.

mmdistill sweep-summary output/2026-01-31/12-00-00
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.workflows.sweep_plot import mean_over_seeds, plot_sweep, plotted_keys, sort_values
from mmdistill.workflows.sweep_results import JobRow, read_sweep, write_table


def print_table(rows: Sequence[JobRow]) -> None:
    """Print one line per combination of the swept values, averaged over seeds."""
    keys = plotted_keys(rows)
    for metric in dict.fromkeys(r.metric for r in rows if r.metric):
        points = mean_over_seeds([r for r in rows if r.metric == metric], keys)
        table = Table(
            *(keys or ["job"]),
            metric,
            title=f"{metric}{', mean ± std over seeds' if _has_repeated_seeds(rows) else ''}",
        )
        orders = [sort_values([p[i] for p in points]) for i in range(len(keys))]
        for point in sorted(points, key=lambda p: [order.index(v) for order, v in zip(orders, p, strict=True)]):
            mean, spread = points[point]
            table.add_row(
                *(point or ["all"]), f"{mean:.4f} ± {spread:.4f}" if _has_repeated_seeds(rows) else f"{mean:.4f}"
            )
        Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def _has_repeated_seeds(rows: Sequence[JobRow]) -> bool:
    return len({r.overrides.get("seed") for r in rows}) > 1 and "seed" not in plotted_keys(rows)


@report_errors("sweep-summary")
def main(argv: Sequence[str] | None = None) -> int:
    """Write the table and the plot. 0 if written, 2 if the folder contains no sweep."""
    parser = make_parser("sweep-summary", __doc__)
    parser.add_argument("folder", type=Path, help="folder of a sweep (a run with -m)")
    folder = parser.parse_args(argv).folder
    rows = read_sweep(folder)
    write_table(rows, folder / "sweep.csv")
    print_table(rows)
    for row in rows:
        if row.error:
            settings = " ".join(f"{k}={v}" for k, v in row.overrides.items() if k in plotted_keys(rows) or k == "seed")
            print(f"no result: {row.job} ({settings}): {row.error}")
    print(f"table: {folder / 'sweep.csv'}")
    if plot_sweep(rows, folder / "sweep.png"):
        print(f"plot: {folder / 'sweep.png'}")
    else:
        print("no plot: it needs two finished jobs with different values of a swept key")
    return 0
