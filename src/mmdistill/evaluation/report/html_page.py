"""`report.html`: one file with everything in it. No scripts, nothing fetched: the page's own policy forbids both."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmdistill.evaluation.report import figures
from mmdistill.evaluation.report.tables import columns, row_cells, select, title_of
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Results, Row
from mmdistill.fewshot.scores import per_class

Picture = Callable[[int], NDArray[np.uint8]]
"""clip position -> uint8 [H, W, 3] RGB, one frame of the clip"""

_STRIP_SUPPORT = 3
_STRIP_QUERY = 5
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
.strip .right img {{ border-color: #009E73; }} .strip .wrong img {{ border-color: #D55E00; }}
details {{ margin: .6rem 0; }} summary {{ cursor: pointer; }} pre {{ overflow-x: auto; font-size: .8rem; }}
</style></head><body>
"""


def render_page(results: Results, *, picture: Picture | None, extra: Mapping[str, Any], embedding: str) -> str:
    """The page as text; arguments as in `report.write_report`."""
    row = results.headline
    title = f"Few-shot evaluation of {row.network}"
    first = results.protocol.combinations()[0]
    same = select(results, *first, results.protocol.heads[0])
    parts = [
        _HEAD.format(title=html.escape(title)),
        _summary(results, title),
        _section("Results", _tables(results)),
        _section("Accuracy by number of support clips", _figure(figures.accuracy_by_shots(results), _SHOTS_NOTE)),
        _section("Episodes", _figure(figures.episode_histogram(same), f"{title_of(row)}. Dashed: the mean.")),
        _section("Which classes are taken for which", _confusion(row, results.features[0])),
        _section("Features in two dimensions", _embedding(results, embedding)),
    ]
    if results.probes:
        parts.append(_section("All classes at once", _figure(figures.probe_bars(results.probes), _PROBE_NOTE)))
    if picture is not None:
        parts.append(_section("One episode", _strip(row, results.features[0], picture)))
    parts.append(_section("Every class", _classes(row, results.features[0])))
    settings = json.dumps({**extra, "protocol": vars(results.protocol)}, indent=1, ensure_ascii=False, default=str)
    parts.append(f"<details><summary>Settings</summary><pre>{html.escape(settings)}</pre></details></body></html>\n")
    return "\n".join(parts)


_SHOTS_NOTE = (
    "Bars are 95 % intervals over episodes. Every network answers the same episodes, so the paired differences in the "
    "tables are sharper than these intervals suggest."
)
_PROBE_NOTE = (
    "Trained on three quarters of the videos, tested on the others, all classes at once; logistic regression on "
    "standardised features, and nearest neighbours by cosine."
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
    eligibility = row.scores.episodes.eligibility
    checkpoint = f" from <code>{html.escape(str(s['checkpoint']))}</code>" if s.get("checkpoint") else ""
    apart = "; support and query come from different videos" if s["disjoint"] else ""
    excluded = html.escape(eligibility.describe(scored.classes))
    return (
        f"<header><h1>{html.escape(title)}</h1>\n"
        f'<p class="lead">{100 * s["top1_action_ensemble"]:.2f} % ± {100 * s["ci95"]:.2f} '
        f"<small>{html.escape(title_of(row))}; chance {100 / s['n_way']:.1f} %</small></p>\n"
        f"<p>Scored network: <strong>{html.escape(row.network)}</strong>{checkpoint}, clips shown as "
        f"{html.escape(row.input_mode)}. {len(scored.ids)} clips{apart}.</p>\n"
        f'<p class="note">± is the half width of the 95 % interval of the mean over episodes. It covers the choice of '
        f"episodes from these clips, not other clips or another training run. {excluded}.</p></header>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", text_columns: int = 1) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="t"' if i < text_columns else "" for i in range(len(cells))]
        return "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True))

    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    inner = f"{title}<thead><tr>{line('th', head)}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def _tables(results: Results) -> str:
    parts = []
    for n_way, k_shot in results.protocol.combinations():
        for head in results.protocol.heads:
            rows = select(results, n_way, k_shot, head)
            cells = [row_cells(results, row) for row in rows]
            parts.append(_table(columns(results), cells, caption=title_of(rows[0]), text_columns=2))
    if results.probes:
        keys = ("linear_top1", "linear_macro", "knn_top1", "majority")
        lines = [
            (str(p["network"]), str(p["input_mode"]), *(f"{100 * float(p[k]):.2f}" for k in keys))
            for p in results.probes
        ]
        titles = (
            "network",
            "clips shown as",
            "linear probe, %",
            "mean over classes",
            "nearest neighbours",
            "most frequent class",
        )
        parts.append(_table(titles, lines, caption="Full label set", text_columns=2))
    return "\n".join(parts)


def _confusion(row: Row, features: Features) -> str:
    svg, shown = figures.confusion_matrix(row, features.classes)
    caption = (
        f"The {shown} classes with the most queries; {title_of(row)}. A cell is the share of the class's queries that "
        "were answered so, among the episodes in which that answer was possible; rows therefore need not add up to 100."
    )
    return _figure(svg, caption)


def _embedding(results: Results, method: str) -> str:
    scored = results.features[0]
    shown = [scored, *[f for f in results.features if f.network != scored.network][:1]]
    svg = figures.embedding_map(shown, method=method, seed=results.protocol.seed)
    name = {"pca": "the first two principal components", "tsne": "t-SNE"}.get(method, method)
    return _figure(svg, f"The most frequent classes by {name} of their features. Axes have no unit.")


def _classes(row: Row, features: Features) -> str:
    table = per_class(row.scores, features.classes)
    ordered = sorted(table.items(), key=lambda item: -item[1]["accuracy"])
    cells = [(name, f"{100 * v['accuracy']:.1f}", str(int(v["queries"]))) for name, v in ordered]
    inner = _table(("class", "accuracy, %", "queries"), cells, caption=title_of(row))
    return f"<details><summary>Accuracy of {len(cells)} classes, best first</summary>{inner}</details>"


def typical_episode(row: Row) -> int:
    """Position of the first episode whose accuracy is nearest to the mean: shown because it is typical."""
    accuracy = row.scores.accuracy
    return int(np.abs(accuracy - accuracy.mean()).argmin())


def _strip(row: Row, features: Features, picture: Picture) -> str:
    number = typical_episode(row)
    scores, episodes = row.scores, row.scores.episodes
    names = [features.classes[c] for c in episodes.classes[number].tolist()]
    answers = scores.predictions[number].reshape(episodes.n_way, episodes.q_sample)
    lines = []
    for n, name in enumerate(names):
        cells = [f"<td><strong>{html.escape(name)}</strong></td>"]
        for clip in episodes.support[number, n, :_STRIP_SUPPORT].tolist():
            cells.append(f"<td>{_thumbnail(picture(clip), f'support clip of {name}')}support</td>")
        for q, clip in enumerate(episodes.query[number, n, :_STRIP_QUERY].tolist()):
            answer = names[int(answers[n, q])]
            state, text = ("right", "✓") if int(answers[n, q]) == n else ("wrong", f"✗ {answer}")
            alt = f"query clip of {name}, answered {answer}"
            cells.append(f'<td class="{state}">{_thumbnail(picture(clip), alt)}{html.escape(text)}</td>')
        lines.append(f"<tr>{''.join(cells)}</tr>")
    caption = (
        f"Episode {int(episodes.numbers[number])}, {100 * scores.accuracy[number]:.0f} % right: the one nearest to the "
        f"mean. Middle frames of support clips, then of the first {min(_STRIP_QUERY, episodes.q_sample)} queries of "
        "each class, green where the answer is right; otherwise the answer is below."
    )
    table = f'<div class="scroll"><table class="strip"><tbody>{"".join(lines)}</tbody></table></div>'
    return f"<figure>{table}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _thumbnail(frame: NDArray[np.uint8], alt: str) -> str:
    height = max(1, round(frame.shape[0] * _THUMBNAIL_WIDTH / frame.shape[1]))
    small = cv2.resize(frame, (_THUMBNAIL_WIDTH, height), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
    if not done:
        raise ValueError("OpenCV could not encode a JPEG")
    source = base64.b64encode(data.tobytes()).decode()
    return f'<img src="data:image/jpeg;base64,{source}" alt="{html.escape(alt)}">'
