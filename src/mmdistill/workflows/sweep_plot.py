"""The picture of a sweep: a line over one swept key, a heat-map over two, a line for each key over more.

Shapes: X, Y values of the swept keys.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdistill.workflows.sweep_results import JobRow, swept_keys

Points = dict[tuple[str, ...], tuple[float, float]]  # values of the keys -> mean and standard deviation of the metric
_TITLES = {"top1_action_ensemble": "few-shot accuracy", "loss": "loss of the last epoch", "train_loss": "training loss"}


def plotted_keys(rows: Sequence[JobRow]) -> list[str]:
    """The swept keys, without `seed` where anything else is swept too: seeds are repetitions."""
    keys = swept_keys(rows)
    return [k for k in keys if k != "seed"] or keys


def mean_over_seeds(rows: Sequence[JobRow], keys: Sequence[str]) -> Points:
    """Mean and population standard deviation of the metric over the finished jobs that share the values of `keys`."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        if row.metric:
            found.setdefault(tuple(row.overrides.get(k, "") for k in keys), []).append(row.values[row.metric])
    return {point: (statistics.fmean(v), statistics.pstdev(v)) for point, v in found.items()}


def ordered(values: Sequence[str]) -> list[str]:
    """Distinct values, by size where all are numbers, else as they came."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if all(_is_number(v) for v in distinct) else distinct


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def grid_of(points: Points) -> tuple[list[str], list[str], np.ndarray]:
    """Columns (second key), rows (first key) and means, NaN where no job finished. (Y, X)"""
    ys, xs = ordered([p[0] for p in points]), ordered([p[1] for p in points])
    values = np.full((len(ys), len(xs)), np.nan)
    for (y, x), (mean, _) in points.items():
        values[ys.index(y), xs.index(x)] = mean
    return xs, ys, values


def draw(rows: Sequence[JobRow], path: Path) -> bool:
    """Write the picture; False, and no file, where fewer than two values are there to compare."""
    keys = plotted_keys(rows)
    metric = next((r.metric for r in rows if r.metric), "")
    rows = [r for r in rows if r.metric == metric]
    if not metric or not keys or len(mean_over_seeds(rows, keys)) < 2:
        return False
    panels = 1 if len(keys) == 2 else len(keys)
    figure = Figure(figsize=(5.2 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    title = _TITLES.get(metric, metric)
    if len(keys) == 2:
        _heat_map(figure, axes[0], mean_over_seeds(rows, keys), keys, title)
    else:
        for ax, key in zip(axes, keys, strict=True):
            _line(ax, mean_over_seeds(rows, [key]), key, title, others=len(keys) > 1)
    figure.savefig(path, dpi=120)
    return True


def _line(
    ax: Axes, points: Mapping[tuple[str, ...], tuple[float, float]], key: str, title: str, *, others: bool
) -> None:
    xs = ordered([p[0] for p in points])
    numeric = all(_is_number(x) for x in xs)
    places = [float(x) for x in xs] if numeric else list(range(len(xs)))
    means, spreads = zip(*(points[(x,)] for x in xs), strict=True)
    ax.errorbar(places, means, yerr=spreads if any(spreads) else None, marker="o", capsize=3, color="#0072B2")
    ax.set_xticks(places, xs)
    ax.set_xlabel(key)
    ax.set_ylabel(f"{title}{' (mean over the other keys)' if others else ''}")
    ax.spines[["top", "right"]].set_visible(False)


def _heat_map(figure: Figure, ax: Axes, points: Points, keys: Sequence[str], title: str) -> None:
    xs, ys, values = grid_of(points)
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
