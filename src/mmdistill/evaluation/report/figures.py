"""Figures of the report as SVG text, drawn with matplotlib without global state or a display.

Shapes: N clips, D width, C classes.
"""

import io
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from mmdistill.evaluation.report.tables import network_label
from mmdistill.fewshot.episodes import FloatArray
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Results, Row, Setting
from mmdistill.fewshot.scores import count_confusions
from mmdistill.modalities.images import choose_fonts
from mmdistill.randomness import integer_rng

# Okabe and Ito's palette, which is suitable for color-blind readers. A network has one color in all reports.
NETWORK_COLORS = {
    "student_rgb": "#0072B2",
    "student_ema_rgb": "#56B4E9",
    "teacher_rgb": "#D55E00",
    "teacher_flow": "#009E73",
    "teacher_skeleton": "#CC79A7",
    "random": "#000000",
    "random_flow": "#7FCFB9",
    "random_skeleton": "#E5BCD3",
}
_OTHER_COLORS = ("#E69F00", "#8C6D31", "#7B4FA3", "#9C9C00", "#888888")  # of networks without a color above
_INPUT_MODE_LINES = ("-", "--", ":", "-.")  # of the input modes of one network
# Paul Tol's palette "muted"; no class has the color of a network
_CLASS_COLORS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255")
MARKERS = "osD^vPX*<>"
_WIDTH = 10.0  # inches, of a figure with a legend of networks; the page is 11 inches wide
_STYLE: Any = {
    "svg.fonttype": "none",  # keeps text as text: small files, and the browser supplies the glyphs of any language
    "svg.hashsalt": "mmdistill",  # makes the file reproducible
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def row_labels(rows: Sequence[Row]) -> list[str]:
    """Names of rows, of which the first is the scored network."""
    return [network_label(row.network, row.input_mode, default_mode=rows[0].input_mode) for row in rows]


def shorten(text: str, limit: int = 34) -> str:
    """The text, with an ellipsis in the middle if it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[: limit - 15]}…{text[-14:]}"


def network_colors(names: Sequence[str]) -> dict[str, str]:
    """Color by name of the network. ``pretrained_flow`` is the same encoder as ``teacher_flow``.

    The color of any other network follows from its name, unless two of them would have the same color.
    """
    colors: dict[str, str] = {}
    for name in dict.fromkeys(names):
        start = zlib.crc32(name.encode()) % len(_OTHER_COLORS)
        order = _OTHER_COLORS[start:] + _OTHER_COLORS[:start]
        free = next((color for color in order if color not in colors.values()), order[0])
        colors[name] = NETWORK_COLORS.get(name.replace("pretrained_", "teacher_"), free)
    return colors


def _row_styles(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Color of the network and line style of the input mode, for each row."""
    colors = network_colors([row.network for row in rows])
    modes = list(dict.fromkeys(row.input_mode for row in rows))
    return [
        {"color": colors[r.network], "linestyle": _INPUT_MODE_LINES[modes.index(r.input_mode) % len(_INPUT_MODE_LINES)]}
        for r in rows
    ]


def _legend_columns(names: Sequence[str]) -> int:
    """Number of columns that fits in `_WIDTH`; constrained layout truncates a wider legend."""
    return max(1, int(12.5 * _WIDTH) // (8 + max(map(len, names))))


def _make_figure(height: float, names: Sequence[str]) -> Figure:
    """A figure whose axes have `height` inches, with space for a legend of `names` below them."""
    legend_rows = -(-len(names) // _legend_columns(names))
    return Figure(figsize=(_WIDTH, height + 0.25 * legend_rows), layout="constrained")


def accuracy_by_shots(results: Results) -> str:
    """Accuracy with 95 % intervals over k_shot, one panel per n_way and classifier."""
    panels = [(n, c) for n in results.protocol.n_way for c in results.protocol.classifiers]
    columns = min(2, len(panels))
    count = -(-len(panels) // columns)
    names = [*row_labels(results.settings[0].rows), "chance"]
    with rc_context(_STYLE):
        figure = _make_figure(4.4 * count, names)
        axes = figure.subplots(count, columns, squeeze=False, sharey=True).ravel()
        for axis, panel in zip(axes[: len(panels)], panels, strict=True):
            _draw_shots_panel(axis, [s for s in results.settings if (s.n_way, s.classifier) == panel])
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=_legend_columns(names))
        return _svg(figure)


def _draw_shots_panel(axis: Axes, settings: Sequence[Setting]) -> None:
    """One curve per network; `settings` differ in k_shot. Points with the same k_shot lie side by side."""
    names, styles = row_labels(settings[0].rows), _row_styles(settings[0].rows)
    offset = min(0.05, 0.6 / len(names))
    for number, (name, style) in enumerate(zip(names, styles, strict=True)):
        summaries = [s.rows[number].summary for s in settings]
        mean = [100 * s["top1_action_ensemble"] for s in summaries]
        half = [100 * s["ci95"] for s in summaries]
        x = np.arange(len(settings)) + offset * (number - (len(names) - 1) / 2)
        marker: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5, "linewidth": 1.2}
        bars = axis.errorbar(x, mean, yerr=half, capsize=3, label=shorten(name, 60), **marker, **style)
        for line in bars[2]:
            line.set_linestyle("-")
    axis.axhline(100 / settings[0].n_way, color="gray", linestyle=(0, (1, 3)), label="chance (100 % / N)")
    axis.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.yaxis.set_tick_params(labelleft=True)
    axis.set_xticks(range(len(settings)), [str(s.k_shot) for s in settings])
    axis.set_xlim(-0.5, len(settings) - 0.5)
    title = f"{settings[0].n_way}-way, {settings[0].classifier}"
    axis.set(xlabel="support clips per class (K)", ylabel="accuracy (%)", title=title)


def confusion_matrix(row: Row, classes: Sequence[str], *, limit: int = 12) -> tuple[str, int]:
    """How often class i is predicted as j in episodes that contain j. Returns the SVG and its number of classes."""
    counts, possible = count_confusions(row.scores, len(classes))
    frequent = np.argsort(-counts.sum(axis=1), kind="stable")[:limit]
    frequent = np.sort(frequent[counts.sum(axis=1)[frequent] > 0])
    rates = np.divide(counts, possible, out=np.full(counts.shape, np.nan), where=possible > 0)
    rates = rates[np.ix_(frequent, frequent)]
    names = [shorten(classes[c]) for c in frequent.tolist()]
    # space for characters that matplotlib measures without their font, each 0.4 em too narrow
    families, missing = choose_fonts("".join(names))
    padding = 0.04 + 0.4 * 10 / 72 * max(sum(c in missing for c in name) for name in names)
    with rc_context({**_STYLE, "font.family": [*families, "sans-serif"]}):
        size = 3.4 + 0.42 * len(frequent)
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        figure.get_layout_engine().set(w_pad=padding, h_pad=padding)  # type: ignore[union-attr, call-arg]
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
        figure = _make_figure(4, row_labels(rows))
        axis = figure.subplots()
        for row, name, style in zip(rows, row_labels(rows), _row_styles(rows), strict=True):
            values = 100 * row.scores.accuracy
            axis.hist(values, bins=edges.tolist(), histtype="step", label=shorten(name, 60), linewidth=1.5, **style)
            axis.plot([float(values.mean())], [0], marker="^", markersize=9, color=style["color"], clip_on=False)
        axis.set(xlabel="accuracy of an episode (%)", ylabel="number of episodes")
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
        figure = Figure(figsize=(5.2 * len(features), 4.8), layout="constrained")
        colors = network_colors([f.network for f in features])
        axes = figure.subplots(1, len(features), squeeze=False).ravel()
        for axis, f in zip(axes, features, strict=True):
            plane = project(f.features[clips].mean(axis=1))
            for number, value in enumerate(selected.tolist()):
                own = first.labels[clips] == value
                style = {"s": 14, "alpha": 0.75, "linewidths": 0, "label": shorten(first.classes[value])}
                marker = {"color": _CLASS_COLORS[number % len(_CLASS_COLORS)], "marker": MARKERS[number % len(MARKERS)]}
                axis.scatter(plane[own, 0], plane[own, 1], **style, **marker)
            title = network_label(f.network, f.input_mode, default_mode=first.input_mode)
            axis.set(xticks=[], yticks=[])
            axis.set_title(shorten(title, 44), color=colors[f.network])
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(features), fontsize=9)
        return _svg(figure)


def probe_bars(probes: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on the full label set, of the linear probe (solid bars) and of k-NN (hatched bars)."""
    names = [network_label(p["network"], p["input_mode"], default_mode=probes[0]["input_mode"]) for p in probes]
    colors = network_colors([p["network"] for p in probes])
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 1.4 + 0.5 * len(names)), layout="constrained")
        axis = figure.subplots()
        y = np.arange(len(names))
        for shift, key, is_solid in ((-0.2, "linear_top1", True), (0.2, "knn_top1", False)):
            for row, p in enumerate(probes):
                color = colors[p["network"]]
                style: Any = (
                    {"color": color} if is_solid else {"facecolor": "white", "edgecolor": color, "hatch": "///"}
                )
                axis.barh(y[row] + shift, 100 * float(p[key]), 0.38, **style)
        majority = axis.axvline(100 * float(probes[0]["majority"]), color="gray", linestyle=":")
        axis.set_yticks(y, [shorten(name, 60) for name in names])
        axis.invert_yaxis()
        axis.set(xlabel="accuracy (%)")
        bars = Patch(color="gray"), Patch(facecolor="white", edgecolor="gray", hatch="///")
        names = ["linear probe", "k-NN", "most frequent class"]
        figure.legend([*bars, majority], names, loc="outside lower center", ncols=3)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():  # class names in any script: the browser supplies the glyphs
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
