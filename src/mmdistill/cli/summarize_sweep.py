"""A sweep as a table (sweep.csv), a picture (sweep.png) and lines here; failed jobs are named.

mmdistill sweep-summary output/2026-01-31/12-00-00
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmdistill.workflows.sweep_plot import draw, mean_over_seeds, ordered, plotted_keys
from mmdistill.workflows.sweep_results import JobRow, read_sweep, write_table


def print_table(rows: Sequence[JobRow]) -> None:
    """One line per value of the swept keys, seeds averaged."""
    keys = plotted_keys(rows)
    for metric in dict.fromkeys(r.metric for r in rows if r.metric):
        points = mean_over_seeds([r for r in rows if r.metric == metric], keys)
        table = Table(
            *(keys or ["job"]), metric, title=f"{metric}{', mean ± std over seeds' if _repeated(rows) else ''}"
        )
        orders = [ordered([p[i] for p in points]) for i in range(len(keys))]
        for point in sorted(points, key=lambda p: [order.index(v) for order, v in zip(orders, p, strict=True)]):
            mean, spread = points[point]
            table.add_row(*(point or ["all"]), f"{mean:.4f} ± {spread:.4f}" if _repeated(rows) else f"{mean:.4f}")
        Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)


def _repeated(rows: Sequence[JobRow]) -> bool:
    return len({r.overrides.get("seed") for r in rows}) > 1 and "seed" not in plotted_keys(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder that -m wrote")
    folder = parser.parse_args(argv).folder
    try:
        rows = read_sweep(folder)
    except ValueError as error:
        print(f"summarize_sweep: error: {error}", file=sys.stderr)
        return 2
    write_table(rows, folder / "sweep.csv")
    print_table(rows)
    for row in rows:
        if row.error:
            settings = " ".join(f"{k}={v}" for k, v in row.overrides.items() if k in plotted_keys(rows) or k == "seed")
            print(f"no result: {row.job} ({settings}): {row.error}")
    print(f"numbers: {folder / 'sweep.csv'}")
    if draw(rows, folder / "sweep.png"):
        print(f"picture: {folder / 'sweep.png'}")
    else:
        print("no picture: fewer than two finished values of a swept key")
    return 0
