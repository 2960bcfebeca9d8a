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

from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Results, Row
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


def _legend_columns(names: Sequence[str]) -> int:
    """Number of columns that fits in the narrowest figure; constrained layout truncates a wider legend."""
    return max(1, 70 // (8 + max(map(len, names))))


def accuracy_by_shots(results: Results) -> str:
    """Accuracy with 95 % intervals over k_shot, one panel per n_way and classifier."""
    panels = [(n, c) for n in results.protocol.n_way for c in results.protocol.classifiers]
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    count = -(-len(panels) // columns)
    with rc_context(_STYLE):
        figure = Figure(figsize=(max(5.5, 3.6 * columns), 3.4 * count), layout="constrained")
        axes = figure.subplots(count, columns, squeeze=False, sharey=True).ravel()
        for axis, (n_way, classifier) in zip(axes, panels, strict=False):
            _draw_shots_panel(axis, results, n_way, classifier)
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(names))
        return _svg(figure)


def _draw_shots_panel(axis: Axes, results: Results, n_way: int, classifier: str) -> None:
    shots = results.protocol.k_shot
    rows = [r for r in results.rows if r.summary["n_way"] == n_way and r.summary["classifier"] == classifier]
    names = row_labels(rows)
    for number, name in enumerate(dict.fromkeys(names)):
        own = [r for r, n in zip(rows, names, strict=True) if n == name]
        mean = [100 * r.summary["top1_action_ensemble"] for r in own]
        half = [100 * r.summary["ci95"] for r in own]
        x = np.arange(len(own)) + 0.06 * (number - (len(names) / len(shots) - 1) / 2)
        style: Any = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
        axis.errorbar(x, mean, yerr=half, capsize=3, label=shorten(name, 60), **style)
    axis.axhline(100 / n_way, color="gray", linestyle=":", label="chance")
    axis.set_xticks(range(len(shots)), [str(k) for k in shots])
    axis.set_xlim(-0.5, len(shots) - 0.5)
    axis.set(xlabel="support clips per class", ylabel="accuracy, %", title=f"{n_way}-way, {classifier}")


def confusion_matrix(row: Row, classes: Sequence[str], *, limit: int = 12) -> tuple[str, int]:
    """How often class i is predicted as j in episodes that contain j, for the most frequent classes.

    Returns:
        The SVG and the number of classes in it.
    """
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


def project(x: NDArray[np.float32], *, method: str, seed: int = 0) -> NDArray[np.float64]:
    """Two dimensions of features (N, D), by "pca" or "tsne" (van der Maaten and Hinton 2008). float64 (N, 2)."""
    if method == "tsne" and len(x) > 10:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(x) - 1) / 3)
        return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(x), dtype=np.float64)
    centered = x.astype(np.float64) - x.mean(axis=0)
    _, vectors = np.linalg.eigh(centered.T @ centered)  # ascending
    first = vectors[:, ::-1][:, :2]
    largest = first[np.abs(first).argmax(axis=0), np.arange(first.shape[1])]
    signs = np.sign(largest)  # the sign of an eigenvector is arbitrary
    plane = np.zeros((len(x), 2))
    plane[:, : first.shape[1]] = centered @ (first * signs)
    return plane


def embedding_map(
    features: Sequence[Features], *, method: str = "pca", most_classes: int = 8, most_clips: int = 1500, seed: int = 0
) -> str:
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
            plane = project(f.features[clips].mean(axis=1), method=method, seed=seed)
            for number, value in enumerate(selected.tolist()):
                own = first.labels[clips] == value
                style: Any = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}
                name = shorten(first.classes[value])
                axis.scatter(plane[own, 0], plane[own, 1], s=14, alpha=0.75, linewidths=0, label=name, **style)
            title = network_label(f.network, f.input_mode, default_mode=first.input_mode)
            axis.set(xticks=[], yticks=[], title=shorten(title, 44))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(features), fontsize=9)
        return _svg(figure)


def probe_bars(probes: Sequence[Mapping[str, float | str]]) -> str:
    """Accuracy on the full label set, of the linear probe and of k-NN."""
    default_mode = str(probes[0]["input_mode"])
    names = [network_label(str(p["network"]), str(p["input_mode"]), default_mode=default_mode) for p in probes]
    with rc_context(_STYLE):
        figure = Figure(figsize=(6.5, 1.2 + 0.5 * len(names)), layout="constrained")
        axis = figure.subplots()
        y = np.arange(len(names))
        for shift, (key, title) in zip(
            (-0.2, 0.2), (("linear_top1", "linear probe"), ("knn_top1", "k-NN")), strict=True
        ):
            color = COLORS[0] if key == "linear_top1" else COLORS[4]
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
