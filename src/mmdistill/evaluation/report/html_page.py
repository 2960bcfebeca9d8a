"""`report.html`: one self-contained file, see `mmdistill.evaluation.report.templates`."""

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmdistill.config.compose import CONFIGS
from mmdistill.evaluation.report import breakdown_tables, ledger_tables
from mmdistill.evaluation.report.frame_images import data_uri, encode_jpeg, resize_to_width
from mmdistill.evaluation.report.tables import FOOTNOTES, probe_tables, result_caveats, result_tables, table_title
from mmdistill.evaluation.report.templates import render_template
from mmdistill.fewshot.protocol import Results, Row
from mmdistill.fewshot.scores import per_class_accuracy
from mmdistill.modalities.images import choose_fonts

ReadFrame = Callable[[int], NDArray[np.uint8]]
"""position of a clip -> one frame of the clip, uint8 (H, W, 3) RGB"""

_MAX_SUPPORT_FRAMES = 3  # per class
_MAX_QUERY_FRAMES = 5
_THUMBNAIL_WIDTH = 240  # px
_GLOSSARY = CONFIGS.parent / "docs" / "glossary.md"
TERMS = (
    *("episode", "N-way", "K-shot", "support clip", "query clip", "clip", "rally", "masked view", "input mode"),
    *("teacher", "student", "classifier", "scored network", "baseline network", "`random`", "`pretrained_rgb`"),
    *("chance level", "confidence interval", "paired difference"),
)
_ORIGIN = ("checkpoint", "modality", "eval_masks", "n_masks", "eval_mask_ratio")


def render_page(
    results: Results,
    *,
    read_frame: ReadFrame | None,
    caveats: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    facts: Sequence[str] = (),
    ledger: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; arguments as in `write_report`. The texts are in ``report.html.jinja``.

    `ledger` is that of the teachers, see `mmdistill.distill.ledger`.
    """
    from mmdistill.evaluation.report import figures  # matplotlib, not at the start of an evaluation

    row, scored = results.headline, results.features[0]
    confusion, num_confused = figures.confusion_matrix(row, scored.classes)
    families, missing = choose_fonts("".join(scored.classes))
    needs_fonts = len(families) > 1 or bool(missing)  # the computer that shows the page can have other fonts
    per_class = per_class_accuracy(row.scores, scored.classes)
    first_baseline = [f for f in results.features if f.network != scored.network][:1]
    networks = [
        {"network": f.network, "input_mode": f.input_mode, **{k: f.info[k] for k in _ORIGIN if k in f.info}}
        for f in results.features
    ]
    blocks = {"Protocol": vars(results.protocol), "Networks": networks, **(settings or {})}
    return render_template(
        "report.html.jinja",
        row=row,
        num_clips=len(scored.ids),
        title=table_title(row),
        caveats=list(dict.fromkeys([*caveats, *result_caveats(results)])),
        facts=facts,
        colors=figures.network_colors([f.network for f in results.features]),
        terms=read_terms(),
        tables=result_tables(results),
        footnotes=FOOTNOTES,
        probes=probe_tables(results),
        card_tables=breakdown_tables.report_card_tables(results),
        card_lines=breakdown_tables.report_card_lines(results),
        audit_tables=breakdown_tables.shortcut_audit_tables(results),
        audit_lines=breakdown_tables.shortcut_audit_lines(results),
        ledger_settings=", ".join((ledger or {}).get("settings", [])),
        ledger_tables=ledger_tables.ledger_tables(ledger),
        ledger_lines=ledger_tables.ledger_lines(ledger),
        shots_figure=_svg_uri(figures.accuracy_by_shots(results)),
        episodes_figure=_svg_uri(figures.episode_histogram(results.settings[0].rows)),
        confusion_figure=_svg_uri(confusion),
        num_confused=num_confused,
        needs_fonts=needs_fonts,
        embedding_figure=_svg_uri(figures.embedding_map([scored, *first_baseline], seed=results.protocol.seed)),
        probe_figure=_svg_uri(figures.probe_bars(results.probes)) if results.probes else None,
        example=_example_episode(row, scored.classes, read_frame) if read_frame else None,
        classes=sorted(per_class.items(), key=lambda item: -item[1]["accuracy"]),
        settings={k: json.dumps(v, indent=1, ensure_ascii=False, default=str) for k, v in blocks.items()},
    )


def read_terms() -> dict[str, str]:
    """The `TERMS` and their meanings in docs/glossary.md, as HTML."""
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", _GLOSSARY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    meanings = {term: re.sub("`(.+?)`", r"<code>\1</code>", html.escape(meaning)) for term, meaning in rows}
    return {re.sub("`(.+?)`", r"<code>\1</code>", term): meanings[term] for term in TERMS}


def typical_episode(row: Row) -> int:
    """Position of the first episode whose accuracy is nearest to the mean."""
    accuracy = row.scores.accuracy
    return int(np.abs(accuracy - accuracy.mean()).argmin())


def _example_episode(row: Row, classes: Sequence[str], read_frame: ReadFrame) -> dict[str, Any]:
    """Number, accuracy, and for each class its name, support frames, and query frames with predictions."""
    scores, episodes = row.scores, row.scores.episodes
    number = typical_episode(row)
    names = [classes[c] for c in episodes.classes[number].tolist()]
    predictions = scores.predictions[number].reshape(episodes.n_way, episodes.q_sample)
    rows = []
    for n, name in enumerate(names):
        support = [_jpeg_uri(read_frame(clip)) for clip in episodes.support[number, n, :_MAX_SUPPORT_FRAMES].tolist()]
        queries = zip(episodes.query[number, n].tolist(), predictions[n].tolist(), strict=True)
        query = [(_jpeg_uri(read_frame(c)), names[p], p == n) for c, p in islice(queries, _MAX_QUERY_FRAMES)]
        rows.append({"name": name, "support": support, "query": query})
    return {"number": int(episodes.numbers[number]), "accuracy": float(scores.accuracy[number]), "rows": rows}


def _svg_uri(svg: str) -> str:
    return data_uri(svg.encode(), "image/svg+xml")


def _jpeg_uri(frame: NDArray[np.uint8]) -> str:
    return data_uri(encode_jpeg(resize_to_width(frame, _THUMBNAIL_WIDTH)))
