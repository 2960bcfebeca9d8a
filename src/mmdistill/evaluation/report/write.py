"""Output of an evaluation: tables on the terminal, `fewshot.json` and `report.html`.

The JSON contains fractions in [0, 1]; tables and page contain percent.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from rich.console import Console

from mmdistill.evaluation.report.breakdown_tables import (
    report_card_lines,
    report_card_tables,
    shortcut_audit_lines,
    shortcut_audit_tables,
)
from mmdistill.evaluation.report.html_page import ReadFrame, render_page
from mmdistill.evaluation.report.tables import (
    FOOTNOTES,
    below_chance_note,
    network_label,
    probe_tables,
    result_tables,
    table_console,
)
from mmdistill.fewshot.episodes import class_name
from mmdistill.fewshot.protocol import Results, Row
from mmdistill.fewshot.scores import paired_difference, per_class_accuracy
from mmdistill.files import atomic_write_bytes, encode_json


def to_json(results: Results, *, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All results as plain values.

    The top level has the keys of the headline row (see `scores.summarize`) and those of `extra`. `settings` has one
    entry per combination and classifier, with `rows` by network and paired `differences` by "first - second" (a key
    contains the input mode if it is not the headline's). Further keys: `probes`, `per_class` (by class name),
    `excluded_classes` (number of clips by class name) and, if they were computed, `report_card` and `shortcut_audit`.
    """
    names, headline = results.features[0].classes, results.headline
    settings = []
    for setting in results.settings:
        rows = {network_label(r.network, r.input_mode, default_mode=headline.input_mode): r for r in setting.rows}
        settings.append(
            {
                **{key: getattr(setting, key) for key in ("n_way", "k_shot", "classifier")},
                "rows": {name: row.summary for name, row in rows.items()},
                "differences": {
                    f"{a} - {b}": paired_difference(rows[a].scores, rows[b].scores) for a, b in permutations(rows, 2)
                },
                "excluded_classes": _excluded(setting.rows[0], names),
            }
        )
    return {
        **headline.summary,
        "checkpoint": headline.summary.get("checkpoint"),
        **(extra or {}),
        "unit": "fraction",
        "support_views": results.protocol.support_views,
        "settings": settings,
        "probes": list(results.probes),
        "per_class": per_class_accuracy(headline.scores, names),
        "excluded_classes": _excluded(headline, names),
        **({"report_card": results.report_card.to_json()} if results.report_card else {}),
        **({"shortcut_audit": results.shortcut_audit.to_json()} if results.shortcut_audit else {}),
    }


def _excluded(row: Row, names: Sequence[str]) -> dict[str, int]:
    """Number of clips of the excluded classes, by name."""
    excluded = row.scores.episodes.eligibility.excluded
    return {class_name(value, names): count for value, count in sorted(excluded.items())}


def print_tables(results: Results, *, console: Console | None = None) -> None:
    """Print the tables to standard output."""
    if console is None:
        console = table_console()
    for table in (*result_tables(results), *probe_tables(results)):
        console.print(table.as_rich())
    for footnote in filter(None, (*FOOTNOTES, below_chance_note(results))):
        console.print(footnote, highlight=False, markup=False, soft_wrap=True)
    for tables, lines in (
        (report_card_tables(results), report_card_lines(results)),
        (shortcut_audit_tables(results), shortcut_audit_lines(results)),
    ):
        for table in tables:
            console.print(table.as_rich())
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
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
    facts: Sequence[str] = (),
) -> Path:
    """Write `fewshot.json` and `report.html` into `folder`, each atomically. Returns the path of the page.

    Args:
        results: the result of `run_protocol`.
        folder: created if it does not exist.
        read_frame: reads a frame of a clip, for the example episode; None: no example episode.
        extra: further top-level keys of the JSON. The page shows ``ledger``, that of the teachers, as tables.
        caveats: sentences at the top of the page, such as the number of clips that overlap. `result_caveats` follow.
        settings: values in the section Settings of the page, by the title of their block; None: those of `extra`.
        facts: sentences in the headline of the page about the data and the training.
    """
    folder = Path(folder)
    content = encode_json(to_json(results, extra=extra), allow_nan=False)
    atomic_write_bytes(folder / "fewshot.json", content, fsync=True)
    settings = (extra or {}) if settings is None else settings
    ledger = (extra or {}).get("ledger")
    text = render_page(results, read_frame=read_frame, caveats=caveats, settings=settings, facts=facts, ledger=ledger)
    atomic_write_bytes(folder / "report.html", text.encode(), fsync=True)
    return folder / "report.html"
