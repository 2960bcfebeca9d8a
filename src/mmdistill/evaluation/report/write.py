"""Output of an evaluation: tables on the terminal, `fewshot.json` and `report.html`.

The JSON contains fractions in [0, 1]; tables and page contain percent.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmdistill.evaluation.report.figures import network_label
from mmdistill.evaluation.report.html_page import ReadFrame, render_page
from mmdistill.evaluation.report.tables import FOOTNOTES, make_tables, select_rows
from mmdistill.fewshot.episodes import class_name
from mmdistill.fewshot.protocol import Results, Row
from mmdistill.fewshot.scores import per_class_accuracy
from mmdistill.files import atomic_write_bytes

_FILE_WIDTH = 140  # characters, if the output is not a terminal


def to_json(results: Results, *, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All results as plain values.

    The top level has the keys of the headline row: `top1_action_ensemble`, `..._std`, `..._std_error`, `ci95` (half of
    the interval), `episodes`, `n_way`, `k_shot`, `q_sample`, `network`, `checkpoint` and more. `settings` has
    one entry per combination and classifier, with `rows` by network and paired `differences` by "first - second" (a key
    contains the input mode if it is not the headline's). Further keys: `probes`, `per_class` (by class name) and
    `excluded_classes` (number of clips by class name).

    Args:
        results: the result of `run_protocol`.
        extra: further top-level keys, such as the configuration.
    """
    first = results.features[0]
    headline = results.headline
    return {
        **headline.summary,
        "checkpoint": headline.summary.get("checkpoint"),
        **(extra or {}),
        "unit": "fraction",
        "support_views": results.protocol.support_views,
        "settings": _settings(results),
        "probes": list(results.probes),
        "per_class": per_class_accuracy(headline.scores, first.classes),
        "excluded_classes": _excluded(headline, first.classes),
    }


def _excluded(row: Row, names: Sequence[str]) -> dict[str, int]:
    """Number of clips of the excluded classes, by name."""
    excluded = row.scores.episodes.eligibility.excluded
    return {class_name(value, names): count for value, count in sorted(excluded.items())}


def _settings(results: Results) -> list[dict[str, Any]]:
    protocol = results.protocol

    def name(network: str, input_mode: str) -> str:
        return network_label(network, input_mode, default_mode=results.headline.input_mode)

    out = []
    for n_way, k_shot in protocol.combinations():
        for classifier in protocol.classifiers:
            setting = {"n_way": n_way, "k_shot": k_shot, "classifier": classifier}
            differences: dict[str, dict[str, float]] = {}
            for d in results.differences:
                if all(d[key] == value for key, value in setting.items()):
                    a, b = name(d["first"], d["first_input_mode"]), name(d["second"], d["second_input_mode"])
                    differences[f"{a} - {b}"] = {key: d[key] for key in _DIFFERENCE}
                    differences[f"{b} - {a}"] = _reverse(d)
            found = select_rows(results, n_way, k_shot, classifier)
            rows = {name(r.network, r.input_mode): r.summary for r in found}
            excluded = _excluded(found[0], results.features[0].classes)
            out.append({**setting, "rows": rows, "differences": differences, "excluded_classes": excluded})
    return out


_DIFFERENCE = ("difference", "std_error", "ci95", "low", "high")


def _reverse(d: Mapping[str, Any]) -> dict[str, float]:
    reversed_values = {"difference": -d["difference"], "low": -d["high"], "high": -d["low"]}
    return {key: reversed_values.get(key, d[key]) for key in _DIFFERENCE}


def print_tables(results: Results, *, console: Console | None = None) -> None:
    """Print the tables to standard output."""
    if console is None:
        console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    for table in make_tables(results):
        console.print(table)
    for footnote in FOOTNOTES:
        console.print(footnote, highlight=False, markup=False, soft_wrap=True)
    scored = results.features[0]
    source = f", checkpoint {scored.info['checkpoint']}" if scored.info.get("checkpoint") else ""
    console.print(f"scored network: {scored.network}{source}", highlight=False, markup=False, soft_wrap=True)


def write_report(
    results: Results,
    folder: str | Path,
    *,
    read_frame: ReadFrame | None = None,
    extra: Mapping[str, Any] | None = None,
    caveats: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    embedding: str = "pca",
) -> Path:
    """Write `fewshot.json` and `report.html` into `folder`, each atomically.

    Args:
        results: the result of `run_protocol`.
        folder: created if it does not exist.
        read_frame: reads a frame of a clip, for the example episode; None: no example episode.
        extra: further top-level keys of the JSON.
        caveats: sentences below the headline of the page, such as the number of clips that overlap.
        settings: values in the section Settings of the page, by the title of their block; None: those of `extra`. The
            page adds the protocol and the networks.
        embedding: "pca" or "tsne".

    Returns:
        The path of the page.
    """
    folder = Path(folder)
    text = json.dumps(to_json(results, extra=extra), indent=1, allow_nan=False, ensure_ascii=False)
    atomic_write_bytes(folder / "fewshot.json", text.encode() + b"\n", fsync=True)
    page = folder / "report.html"
    text = render_page(
        results,
        read_frame=read_frame,
        embedding=embedding,
        caveats=caveats,
        settings=extra if settings is None else settings,
    )
    atomic_write_bytes(page, text.encode(), fsync=True)
    return page
