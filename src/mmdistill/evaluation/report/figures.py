"""Figures of the report as SVG text, drawn with matplotlib without global state or a display.

Shapes: N clips, D width, C classes.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mmdistill.fewshot.episodes import FloatArray
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Results, Row, Setting
from mmdistill.fewshot.scores import count_confusions
from mmdistill.randomness import integer_rng

# Okabe and Ito's palette, which is suitable for color-blind readers
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7B4FA3", "#9C9C00")
MARKERS = "osD^vPX*<>"
_STYLE: Any = {
    "svg.fonttype": "none",  # keeps text as text: small files, and the browser supplies the glyphs of any language
    "svg.hashsalt": "mmdistill",  # makes the file reproducible
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def network_label(network: str, input_mode: str, *, default_mode: str) -> str:
    """Name of a curve; the input mode is added if it is not that of the scored network."""
    return network if input_mode == default_mode else f"{network} ({input_mode})"


def row_labels(rows: Sequence[Row]) -> list[str]:
    """Names of rows, of which the first is the scored network."""
    return [network_label(row.network, row.input_mode, default_mode=rows[0].input_mode) for row in rows]


def shorten(text: str, limit: int = 34) -> str:
    """The text, with an ellipsis in the middle if it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[: limit - 15]}…{text[-14:]}"


def _marker(number: int) -> dict[str, Any]:
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def _legend_columns(names: Sequence[str]) -> int:
    """Number of columns that fits in the narrowest figure; constrained layout truncates a wider legend."""
    return max(1, 70 // (8 + max(map(len, names))))


def accuracy_by_shots(results: Results) -> str:
    """Accuracy with 95 % intervals over k_shot, one panel per n_way and classifier."""
    panels = [(n, c) for n in results.protocol.n_way for c in results.protocol.classifiers]
    columns = min(3, len(panels))
    count = -(-len(panels) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(max(5.5, 3.6 * columns), 3.4 * count), layout="constrained")
        axes = figure.subplots(count, columns, squeeze=False, sharey=True).ravel()
        for axis, panel in zip(axes[: len(panels)], panels, strict=True):
            _draw_shots_panel(axis, [s for s in results.settings if (s.n_way, s.classifier) == panel])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(names))
        return _svg(figure)


def _draw_shots_panel(axis: Axes, settings: Sequence[Setting]) -> None:
    """One curve per network; `settings` differ in k_shot."""
    names = row_labels(settings[0].rows)
    for number, (name, rows) in enumerate(zip(names, zip(*(s.rows for s in settings), strict=True), strict=True)):
        mean = [100 * r.summary["top1_action_ensemble"] for r in rows]
        half = [100 * r.summary["ci95"] for r in rows]
        x = np.arange(len(rows)) + 0.06 * (number - (len(names) - 1) / 2)
        axis.errorbar(x, mean, yerr=half, capsize=3, label=shorten(name, 60), **_marker(number))
    axis.axhline(100 / settings[0].n_way, color="gray", linestyle=":", label="chance")
    axis.set_xticks(range(len(settings)), [str(s.k_shot) for s in settings])
    axis.set_xlim(-0.5, len(settings) - 0.5)
    title = f"{settings[0].n_way}-way, {settings[0].classifier}"
    axis.set(xlabel="support clips per class", ylabel="accuracy, %", title=title)


def confusion_matrix(row: Row, classes: Sequence[str], *, limit: int = 12) -> tuple[str, int]:
    """How often class i is predicted as j in episodes that contain j. Returns the SVG and its number of classes."""
    counts, possible = count_confusions(row.scores, len(classes))
    frequent = np.argsort(-counts.sum(axis=1), kind="stable")[:limit]
    frequent = np.sort(frequent[counts.sum(axis=1)[frequent] > 0])
    rates = np.divide(counts, possible, out=np.full(counts.shape, np.nan), where=possible > 0)
    rates = rates[np.ix_(frequent, frequent)]
    names = [shorten(classes[c]) for c in frequent.tolist()]
    with rc_context(_STYLE):
        size = 3.4 + 0.42 * len(frequent)
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axis = figure.subplots()
        image = axis.imshow(100 * rates, cmap="Blues", vmin=0, vmax=100)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="predicted class", ylabel="true class")
        for (i, j), value in np.ndenumerate(rates):
            if np.isfinite(value):
                color = "white" if value > 0.6 else "black"
                axis.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, ax=axis, shrink=0.7, label="% of queries")
        return _svg(figure), len(frequent)


def episode_histogram(rows: Sequence[Row]) -> str:
    """Distribution of the episodes' accuracies, one line per row of one combination and classifier."""
    queries = rows[0].scores.predictions.shape[1]
    step = max(1, round(queries / 25))
    edges = (np.arange(0, queries + 1 + step, step) - 0.5) / queries * 100
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.5, 3.4), layout="constrained")
        axis = figure.subplots()
        for number, (row, name) in enumerate(zip(rows, row_labels(rows), strict=True)):
            color = COLORS[number % len(COLORS)]
            values = 100 * row.scores.accuracy
            axis.hist(values, bins=edges.tolist(), histtype="step", color=color, label=shorten(name, 60), linewidth=1.5)
            axis.axvline(float(values.mean()), color=color, linestyle="--", linewidth=1)
        axis.set(xlabel="accuracy of an episode, %", ylabel="episodes")
        figure.legend(loc="outside lower center", ncols=_legend_columns(row_labels(rows)))
        return _svg(figure)


def project(x: FloatArray) -> NDArray[np.float64]:
    """The first two principal components of features (N, D), 0 if there is only one. float64 (N, 2)."""
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # constant features have no variance
        found = PCA(min(2, *x.shape), svd_solver="full").fit_transform(x.astype(np.float64))
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def embedding_map(features: Sequence[Features], *, most_classes: int = 8, most_clips: int = 1500, seed: int = 0) -> str:
    """Clips in two dimensions, one color per class, one panel per entry; the views of a clip are averaged."""
    first = features[0]
    labeled = np.flatnonzero(first.labels >= 0)
    values, counts = np.unique(first.labels[labeled], return_counts=True)
    selected = values[np.argsort(-counts, kind="stable")[:most_classes]]
    clips = labeled[np.isin(first.labels[labeled], selected)]
    clips = np.sort(integer_rng(seed).permutation(clips)[:most_clips])
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.8 * len(features), 4.6), layout="constrained")
        axes = figure.subplots(1, len(features), squeeze=False).ravel()
        for axis, f in zip(axes, features, strict=True):
            plane = project(f.features[clips].mean(axis=1))
            for number, value in enumerate(selected.tolist()):
                own = first.labels[clips] == value
                style = {"s": 14, "alpha": 0.75, "linewidths": 0, "label": shorten(first.classes[value])}
                axis.scatter(plane[own, 0], plane[own, 1], **style, **_marker(number))
            title = network_label(f.network, f.input_mode, default_mode=first.input_mode)
            axis.set(xticks=[], yticks=[], title=shorten(title, 44))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(features), fontsize=9)
        return _svg(figure)


def probe_bars(probes: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on the full label set, of the linear probe and of k-NN."""
    names = [network_label(p["network"], p["input_mode"], default_mode=probes[0]["input_mode"]) for p in probes]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.5, 1.2 + 0.5 * len(names)), layout="constrained")
        axis = figure.subplots()
        y = np.arange(len(names))
        for shift, key, title, color in (
            (-0.2, "linear_top1", "linear probe", COLORS[0]),
            (0.2, "knn_top1", "k-NN", COLORS[4]),
        ):
            axis.barh(y + shift, [100 * float(p[key]) for p in probes], 0.38, color=color, label=title)
        axis.axvline(100 * float(probes[0]["majority"]), color="gray", linestyle=":", label="most frequent class")
        axis.set_yticks(y, [shorten(name, 60) for name in names])
        axis.invert_yaxis()
        axis.set(xlabel="accuracy, %")
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():  # class names in any script: the browser supplies the glyphs
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
