"""`report.html`: one self-contained file. Its content security policy forbids scripts and requests."""

import base64
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmdistill.errors import format_count
from mmdistill.evaluation.report import figures
from mmdistill.evaluation.report.tables import (
    COLUMNS,
    FOOTNOTES,
    PROBE_COLUMNS,
    probe_rows,
    probe_title,
    row_cells,
    select_rows,
    table_title,
)
from mmdistill.evaluation.report.terms import TERMS
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Results, Row
from mmdistill.fewshot.scores import per_class_accuracy

ReadFrame = Callable[[int], NDArray[np.uint8]]
"""position of a clip -> one frame of the clip, uint8 (H, W, 3) RGB"""

_MAX_SUPPORT_FRAMES = 3  # per class
_MAX_QUERY_FRAMES = 5
_THUMBNAIL_WIDTH = 168

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1f23; background: #fff; margin: 0 auto; max-width: 1080px;
  padding: 1.5rem; }}
h1 {{ font-size: 1.6rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 .4rem; }}
.lead {{ font-size: 2.2rem; font-weight: 600; margin: .4rem 0; }} .lead small {{ font-size: 1rem; font-weight: 400; }}
p.note, figcaption {{ color: #555; font-size: .9rem; max-width: 75ch; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums; font-size: .93rem; }}
caption {{ text-align: left; font-weight: 600; padding: .4rem 0; }}
th, td {{ padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child, th.t, td.t {{ text-align: left; }}
tr.scored td {{ font-weight: 600; }}
figure {{ margin: .5rem 0; }} figure > img {{ max-width: 100%; height: auto; }}
.strip td {{ padding: .15rem; border: 0; vertical-align: top; text-align: left; font-size: .75rem; max-width: 12rem;
  overflow-wrap: anywhere; }}
.strip img {{ display: block; width: 100%; min-width: 84px; box-sizing: border-box; border: 3px solid #bbb; }}
.strip .correct img {{ border-color: #009E73; }} .strip .wrong img {{ border-color: #D55E00; }}
.caveats {{ border-left: 4px solid #E69F00; padding: .1rem 0 .1rem 1rem; max-width: 75ch; }}
dt {{ font-weight: 600; }} dd {{ margin: 0 0 .4rem 1.2rem; max-width: 75ch; }}
details {{ margin: .6rem 0; }} summary {{ cursor: pointer; }} pre {{ overflow-x: auto; font-size: .8rem; }}
</style></head><body>
"""


def render_page(
    results: Results,
    *,
    read_frame: ReadFrame | None,
    embedding: str,
    caveats: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The page as text; arguments as in `write_report`."""
    row = results.headline
    title = f"Few-shot evaluation of {row.network}"
    first = results.protocol.combinations()[0]
    rows = select_rows(results, *first, results.protocol.classifiers[0])
    parts = [
        _HEAD.format(title=html.escape(title)),
        _summary(results, title),
        _caveats(caveats),
        _section("Results", _result_tables(results)),
        _section("Accuracy by number of support clips", _figure(figures.accuracy_by_shots(results), _SHOTS_NOTE)),
        _section(
            "Accuracy per episode", _figure(figures.episode_histogram(rows), f"{table_title(row)}. Dashed: means.")
        ),
        _section("Confusion matrix", _confusion(row, results.features[0])),
        _section("Features in two dimensions", _embedding(results, embedding)),
    ]
    if results.probes:
        parts.append(_section("Full label set", _figure(figures.probe_bars(results.probes), _PROBE_NOTE)))
    if read_frame is not None:
        parts.append(_section("Example episode", _example_episode(row, results.features[0], read_frame)))
    parts.append(_section("Accuracy by class", _class_table(row, results.features[0])))
    parts += [_terms(), _settings(results, settings or {}), "</body></html>\n"]
    return "\n".join(parts)


_MEANS = "Dashed lines are means."
_SHOTS_NOTE = (
    "Bars are 95 % intervals over episodes. All networks are evaluated on the same episodes, so the intervals of the "
    "paired differences in the tables are narrower."
)
_PROBE_NOTE = (
    "Trained on three quarters of the videos and tested on the others, with all classes. The linear probe is logistic "
    "regression on standardized features. k-NN uses the cosine similarity."
)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}\n</section>"


def _figure(svg: str, caption: str, alt: str = "") -> str:
    data = base64.b64encode(svg.encode()).decode()
    text = html.escape(caption)
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure><img src="{source}" alt="{html.escape(alt) or text}"><figcaption>{text}</figcaption></figure>'


def _summary(results: Results, title: str) -> str:
    row, scored = results.headline, results.features[0]
    s = row.summary
    checkpoint = f" from <code>{html.escape(str(s['checkpoint']))}</code>" if s.get("checkpoint") else ""
    disjoint = " Support and query clips come from different videos." if s["disjoint"] else ""
    excluded = html.escape(row.scores.episodes.eligibility.describe(scored.classes))
    excluded = f" {excluded[0].upper()}{excluded[1:]}." if excluded else ""
    return (
        f"<header><h1>{html.escape(title)}</h1>\n"
        f'<p class="lead">{100 * s["top1_action_ensemble"]:.2f} % ± {100 * s["ci95"]:.2f} '
        f"<small>{html.escape(table_title(row))}; chance {100 / s['n_way']:.1f} %</small></p>\n"
        f"<p>Scored network: <strong>{html.escape(row.network)}</strong>{checkpoint}. "
        f"Input: {html.escape(row.input_mode)} ({len(scored.ids)}).{disjoint}</p>\n"
        f'<p class="note">± is half of the 95 % interval of the mean over episodes. The interval covers the choice of '
        f"episodes from these clips. It does not cover other clips or another training seed.{excluded} "
        'The section <a href="#terms">Terms</a> defines the terms.</p></header>'
    )


def _caveats(caveats: Sequence[str]) -> str:
    if not caveats:
        return ""
    items = "".join(f"<li>{html.escape(caveat)}</li>" for caveat in caveats)
    return f'<section class="caveats"><h2>Caveats</h2>\n<ul>{items}</ul></section>'


def _terms() -> str:
    def meaning(text: str) -> str:
        return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))

    items = "\n".join(f"<dt>{html.escape(term)}</dt><dd>{meaning(text)}</dd>" for term, text in TERMS.items())
    return f'<section id="terms"><h2>Terms</h2>\n<dl>{items}</dl></section>'


def _settings(results: Results, settings: Mapping[str, Any]) -> str:
    """The protocol, the origin of each network's features, and `settings`, one block each."""
    networks = [{"network": f.network, "input_mode": f.input_mode, **_origin(f)} for f in results.features]
    protocol = {key: value for key, value in vars(results.protocol).items() if key != "workers"}  # no effect
    blocks = {"Protocol": protocol, "Networks": networks, **settings}
    parts = []
    for title, values in blocks.items():
        text = json.dumps(values, indent=1, ensure_ascii=False, default=str)
        parts.append(f"<h3>{html.escape(title)}</h3><pre>{html.escape(text)}</pre>")
    return f"<details><summary>Settings</summary>{''.join(parts)}</details>"


def _origin(features: Features) -> dict[str, Any]:
    keys = ("checkpoint", "modality", "eval_masks", "n_masks", "eval_mask_ratio")
    return {key: features.info[key] for key in keys if key in features.info}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", text_columns: int = 1) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        classes = [' class="t"' if i < text_columns else "" for i in range(len(cells))]
        return "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for cell, c in zip(cells, classes, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    inner = f"{title}<thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def _result_tables(results: Results) -> str:
    parts = []
    for n_way, k_shot in results.protocol.combinations():
        for classifier in results.protocol.classifiers:
            rows = select_rows(results, n_way, k_shot, classifier)
            cells = [row_cells(results, row) for row in rows]
            parts.append(_table(COLUMNS, cells, caption=table_title(rows[0]), text_columns=2))
    parts.append(f'<p class="note">{html.escape(" ".join(FOOTNOTES))}</p>')
    if results.probes:
        parts.append(_table(PROBE_COLUMNS, probe_rows(results), caption=probe_title(results), text_columns=2))
    return "\n".join(parts)


def _confusion(row: Row, features: Features) -> str:
    svg, num_classes = figures.confusion_matrix(row, features.classes)
    caption = (
        f"The {num_classes} classes with the most queries; {table_title(row)}. A cell is the share of the true "
        "class's queries that are predicted as the column's class, over the episodes that contain both classes. The "
        "sum of a row is not 100 %."
    )
    return _figure(svg, caption)


def _embedding(results: Results, method: str) -> str:
    scored = results.features[0]
    selected = [scored, *[f for f in results.features if f.network != scored.network][:1]]
    svg = figures.embedding_map(selected, method=method, seed=results.protocol.seed)
    name = {"pca": "The first two principal components", "tsne": "t-SNE"}.get(method, method)
    return _figure(svg, f"{name} of the features of the most frequent classes. The axes have no unit.")


def _class_table(row: Row, features: Features) -> str:
    table = per_class_accuracy(row.scores, features.classes)
    ordered = sorted(table.items(), key=lambda item: -item[1]["accuracy"])
    cells = [(name, f"{100 * v['accuracy']:.1f}", str(int(v["queries"]))) for name, v in ordered]
    inner = _table(("class", "accuracy, %", "queries"), cells, caption=table_title(row))
    return f"<details><summary>{format_count(len(cells), 'class')}, highest accuracy first</summary>{inner}</details>"


def typical_episode(row: Row) -> int:
    """Position of the first episode whose accuracy is nearest to the mean."""
    accuracy = row.scores.accuracy
    return int(np.abs(accuracy - accuracy.mean()).argmin())


def _example_episode(row: Row, features: Features, read_frame: ReadFrame) -> str:
    number = typical_episode(row)
    scores, episodes = row.scores, row.scores.episodes
    names = [features.classes[c] for c in episodes.classes[number].tolist()]
    predictions = scores.predictions[number].reshape(episodes.n_way, episodes.q_sample)
    lines = []
    for n, name in enumerate(names):
        cells = [f"<td><strong>{html.escape(name)}</strong></td>"]
        for clip in episodes.support[number, n, :_MAX_SUPPORT_FRAMES].tolist():
            cells.append(f"<td>{_thumbnail(read_frame(clip), f'support clip of {name}')}support</td>")
        for q, clip in enumerate(episodes.query[number, n, :_MAX_QUERY_FRAMES].tolist()):
            predicted = names[int(predictions[n, q])]
            state, text = ("correct", "✓") if int(predictions[n, q]) == n else ("wrong", f"✗ {predicted}")
            alt = f"query clip of {name}, predicted as {predicted}"
            cells.append(f'<td class="{state}">{_thumbnail(read_frame(clip), alt)}{html.escape(text)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = (
        f"Episode {int(episodes.numbers[number])}, accuracy {100 * scores.accuracy[number]:.0f} %: the first one whose "
        "accuracy is nearest to the mean. Each row is a class: middle frames of support clips, then of the first "
        f"{format_count(min(_MAX_QUERY_FRAMES, episodes.q_sample), 'query')}. Green: correct. Red: wrong, with "
        "the predicted class."
    )
    table = f'<div class="scroll"><table class="strip"><tbody>{"".join(lines)}</tbody></table></div>'
    return f"<figure>{table}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _thumbnail(frame: NDArray[np.uint8], alt: str) -> str:
    height = max(1, round(frame.shape[0] * _THUMBNAIL_WIDTH / frame.shape[1]))
    small = cv2.resize(frame, (_THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
    encoded, data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not encoded:
        raise ValueError("OpenCV could not encode a JPEG")
    source = base64.b64encode(data.tobytes()).decode()
    return f'<img src="data:image/jpeg;base64,{source}" alt="{html.escape(alt)}">'
