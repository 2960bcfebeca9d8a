"""Plot the results of a sweep: a line for one swept key, a heat-map for two, one line plot per key for more.

Shapes: X and Y are the numbers of values of two swept keys.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdistill.workflows.sweep_results import JobRow, swept_keys

Points = dict[tuple[str, ...], tuple[float, float]]  # values of the keys -> (mean, standard deviation) of the metric
_TITLES = {"top1_action_ensemble": "few-shot accuracy", "loss": "loss of the last epoch", "train_loss": "training loss"}


def plotted_keys(rows: Sequence[JobRow]) -> list[str]:
    """The swept keys without `seed`, unless only `seed` is swept: seeds are repetitions."""
    keys = swept_keys(rows)
    return [k for k in keys if k != "seed"] or keys


def mean_over_seeds(rows: Sequence[JobRow], keys: Sequence[str]) -> Points:
    """Mean and population standard deviation of the metric over the finished jobs with equal values of `keys`."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row.metric:
            found.setdefault(tuple(row.overrides.get(k, "") for k in keys), []).append(row.values[row.metric])
    return {point: (statistics.fmean(v), statistics.pstdev(v)) for point, v in found.items()}


def sort_values(values: Sequence[str]) -> list[str]:
    """Distinct values, sorted if all are numbers, else in order of appearance."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if all(_is_number(v) for v in distinct) else distinct


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def to_grid(points: Points) -> tuple[list[str], list[str], np.ndarray]:
    """Values of the second key (X), of the first key (Y), and the means (Y, X); NaN where no job finished."""
    ys, xs = sort_values([p[0] for p in points]), sort_values([p[1] for p in points])
    values = np.full((len(ys), len(xs)), np.nan)
    for (y, x), (mean, _) in points.items():
        values[ys.index(y), xs.index(x)] = mean
    return xs, ys, values


def plot_sweep(rows: Sequence[JobRow], path: Path) -> bool:
    """Write the plot. Returns False and writes nothing if there are fewer than two points."""
    keys = plotted_keys(rows)
    metric = next((r.metric for r in rows if r.metric), "")
    rows = [r for r in rows if r.metric == metric]
    if not metric or not keys or len(mean_over_seeds(rows, keys)) < 2:
        return False
    panels = 1 if len(keys) == 2 else len(keys)
    title = _TITLES.get(metric, metric)
    with rc_context({"font.family": _font_families(rows)}):
        figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if len(keys) == 2:
            _plot_heat_map(figure, axes[0], mean_over_seeds(rows, keys), keys, title)
        else:
            for ax, key in zip(axes, keys, strict=True):
                _plot_line(ax, mean_over_seeds(rows, [key]), key, title, averaged=len(keys) > 1)
        figure.savefig(path, dpi=120)
    return True


def _font_families(rows: Sequence[JobRow]) -> list[str]:
    """Fonts with the letters of all values."""
    text = "".join(value for row in rows for value in row.overrides.values())
    if text.isascii():
        return ["DejaVu Sans"]
    from mmdistill.modalities.images import choose_fonts  # imports torch

    return choose_fonts(text)[0]


def _plot_line(
    ax: Axes, points: Mapping[tuple[str, ...], tuple[float, float]], key: str, title: str, *, averaged: bool
) -> None:
    xs = sort_values([p[0] for p in points])
    numeric = all(_is_number(x) for x in xs)
    positions = [float(x) for x in xs] if numeric else list(range(len(xs)))
    means, spreads = zip(*(points[(x,)] for x in xs), strict=True)
    ax.errorbar(positions, means, yerr=spreads if any(spreads) else None, marker="o", capsize=3, color="#0072B2")
    ax.set_xticks(positions, xs)
    ax.set_xlabel(key)
    ax.set_ylabel(f"{title}{' (mean over the other keys)' if averaged else ''}")
    ax.spines[["top", "right"]].set_visible(False)


def _plot_heat_map(figure: Figure, ax: Axes, points: Points, keys: Sequence[str], title: str) -> None:
    xs, ys, values = to_grid(points)
    image = ax.imshow(values, aspect="auto", cmap="viridis")
    ax.set_xticks(range(len(xs)), xs)
    ax.set_yticks(range(len(ys)), ys)
    ax.set_xlabel(keys[1])
    ax.set_ylabel(keys[0])
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for y, x in np.ndindex(*values.shape):
        value = values[y, x]
        text = "no result" if np.isnan(value) else f"{value:.4g}"
        ax.text(x, y, text, ha="center", va="center", color="black" if value > middle else "white")
    figure.colorbar(image, label=title)
