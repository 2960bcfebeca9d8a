"""What is written of an evaluation: a table on the terminal, `fewshot.json`, and one page, `report.html`.

JSON has fractions in [0, 1]; the table and the page have percent.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mmdistill.evaluation.report.figures import label
from mmdistill.evaluation.report.html_page import Picture, render_page
from mmdistill.evaluation.report.tables import select, tables
from mmdistill.fewshot.episodes import class_name
from mmdistill.fewshot.features import atomic_write_bytes
from mmdistill.fewshot.protocol import Results, Row
from mmdistill.fewshot.scores import per_class

_FILE_WIDTH = 140


def to_json(results: Results, *, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything as plain values.

    At the top stand the keys of the headline row: `top1_action_ensemble`, `..._std`, `..._std_error`, `ci95` (half
    width of the interval), `episodes`, `n_way`, `k_shot`, `q_sample`, `network`, `checkpoint` and more. `settings` has
    one entry per combination and head, with `rows` by network and paired `differences` by "first - second" (the keys
    name the input_mode too where it is not the headline's). `probes`, `per_class` (by class name) and `excluded_classes`
    (clips by class name) follow.

    Args:
        results: of `run_protocol`.
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
        "per_class": per_class(headline.scores, first.classes),
        "excluded_classes": _excluded(headline, first.classes),
    }


def _excluded(row: Row, names: Sequence[str]) -> dict[str, int]:
    """Clips of the classes that are too small, by name."""
    excluded = row.scores.episodes.eligibility.excluded
    return {class_name(value, names): count for value, count in sorted(excluded.items())}


def _settings(results: Results) -> list[dict[str, Any]]:
    protocol = results.protocol

    def name(network: str, input_mode: str) -> str:
        return label(network, input_mode, usual=results.headline.input_mode)

    out = []
    for n_way, k_shot in protocol.combinations():
        for head in protocol.heads:
            setting = {"n_way": n_way, "k_shot": k_shot, "classifier": head}
            differences: dict[str, dict[str, float]] = {}
            for d in results.differences:
                if all(d[key] == value for key, value in setting.items()):
                    a, b = name(d["first"], d["first_input_mode"]), name(d["second"], d["second_input_mode"])
                    differences[f"{a} - {b}"] = {key: d[key] for key in _DIFFERENCE}
                    differences[f"{b} - {a}"] = _reversed(d)
            found = select(results, n_way, k_shot, head)
            rows = {name(r.network, r.input_mode): r.summary for r in found}
            excluded = _excluded(found[0], results.features[0].classes)
            out.append({**setting, "rows": rows, "differences": differences, "excluded_classes": excluded})
    return out


_DIFFERENCE = ("difference", "std_error", "ci95", "low", "high")


def _reversed(d: Mapping[str, Any]) -> dict[str, float]:
    flipped = {"difference": -d["difference"], "low": -d["high"], "high": -d["low"]}
    return {key: flipped.get(key, d[key]) for key in _DIFFERENCE}


def print_tables(results: Results, *, console: Console | None = None) -> None:
    """The tables on standard output."""
    if console is None:
        terminal = sys.stdout.isatty()
        console = Console() if terminal else Console(width=_FILE_WIDTH)  # 80 otherwise, too narrow for these tables
    for table in tables(results):
        console.print(table)
    scored = results.features[0]
    source = f", checkpoint {scored.info['checkpoint']}" if scored.info.get("checkpoint") else ""
    console.print(f"scored network: {scored.network}{source}", highlight=False, markup=False, soft_wrap=True)


def write_report(
    results: Results,
    folder: str | Path,
    *,
    picture: Picture | None = None,
    extra: Mapping[str, Any] | None = None,
    embedding: str = "pca",
) -> Path:
    """Write `fewshot.json` and `report.html` into `folder`, each whole or not at all.

    Args:
        results: of `run_protocol`.
        folder: made where it is missing.
        picture: gives a frame of a clip, for the strip of one episode; without it there is no strip.
        extra: further top-level keys of the JSON; shown at the end of the page.
        embedding: "pca" or "tsne".

    Returns:
        the page.
    """
    folder = Path(folder)
    text = json.dumps(to_json(results, extra=extra), indent=1, allow_nan=False, ensure_ascii=False)
    atomic_write_bytes(folder / "fewshot.json", text.encode() + b"\n")
    page = folder / "report.html"
    atomic_write_bytes(page, render_page(results, picture=picture, extra=extra or {}, embedding=embedding).encode())
    return page
