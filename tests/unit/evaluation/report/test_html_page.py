import base64
import html
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np

from mmdistill.evaluation.report.figures import network_colors
from mmdistill.evaluation.report.html_page import render_page, typical_episode
from mmdistill.fewshot.protocol import Results

GLOSSARY = Path(__file__).resolve().parents[4] / "docs" / "glossary.md"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag == "img":
            assert dict(attrs).get("alt"), "an image without a description"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_self_contained_and_escaped(page: Path):
    found = Page()
    found.feed(page.read_text())
    assert found.open == []
    assert "script" not in found.tags
    assert found.links
    assert all(link.startswith("data:") or link[1:] in found.ids for link in found.links)
    assert found.tags.count("figure") == 6
    assert found.tags.count("tr") > 30


def test_the_header_states_network_input_clips_and_glossary(results: Results, page: Path):
    text = page.read_text()
    assert "Scored network: <strong>student_rgb</strong> from <code>/runs/student_rgb.ckpt</code>. " in text
    assert "Input: 2 tube masks (242). Support and query clips come from different videos.</p>" in text
    assert 'The section <a href="#terms">Terms</a> defines the terms.' in text
    assert '<section id="terms"><h2>Terms</h2>' in text
    assert "<dt>paired difference</dt>" in text
    assert "<code>data_module.num_frames</code> frames of one rally" in text
    assert "xcluded classes" not in text  # no class is excluded
    assert "Encoding time covers preprocessing" in text
    assert "std is the standard deviation of the accuracy over episodes." in text
    assert text.count("<td>reference</td>") == 4
    assert text.count("encoding\ntime (s)") == 4


def test_the_terms_are_those_of_the_glossary(page: Path):
    text = html.unescape(" ".join(page.read_text().split()))
    terms = dict(re.findall(r"<dt>(.+?)</dt><dd>(.+?)</dd>", re.sub("</?code>", "`", text)))
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", GLOSSARY.read_text(), flags=re.MULTILINE))
    assert len(terms) == 19
    assert {"teacher", "chance level", "`random`", "`pretrained_rgb`"} <= set(terms)
    ten = {"episode", "N-way", "K-shot", "support clip", "query clip", "student", "teacher", "confidence interval"}
    ten |= {"paired difference", "chance level"}
    assert ten <= set(terms)
    assert all(terms[term].count(". ") == 0 for term in ten)  # one sentence each
    assert {term: rows.get(term) for term in terms} == terms


def test_without_frames_there_is_no_example_episode(results: Results, page: Path):
    assert "<h2>Example episode</h2>" in page.read_text()
    assert "<h2>Example episode</h2>" not in render_page(results, read_frame=None)


def test_caveats_are_above_the_accuracy(results: Results):
    text = render_page(results, read_frame=None, caveats=["3 clips overlap", "2 of 4 <rallies>"])
    caveats = text[text.index("<h2>Caveats</h2>") : text.index('<p class="lead">')]
    assert "<li>3 clips overlap</li><li>2 of 4 &lt;rallies&gt;</li>" in caveats


def test_rows_of_the_tables_have_the_color_of_the_network_in_the_figures(results: Results, page: Path):
    colors = network_colors([f.network for f in results.features])
    for name in ("student_rgb", "random"):
        swatch = f'<span class="color" style="background: {colors[name]}"></span>{name}</td>'
        assert page.read_text().count(swatch) == (5 if name == "random" else 10)


def test_class_names_of_other_scripts_stay_text_and_have_a_notice(results: Results, page: Path):
    """A browser draws the text of an SVG with the fonts of its computer."""
    figures = [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]+)", page.read_text())]
    assert any("网球" in figure for figure in figures)
    assert "install a font with these characters" in page.read_text()
    latin = tuple(f"class {number}" for number in range(8))
    renamed = replace(results, features=tuple(replace(f, classes=latin) for f in results.features))
    assert "install a font" not in render_page(renamed, read_frame=None)


def test_frames_of_the_example_episode_show_a_player(results: Results):
    text = render_page(results, read_frame=lambda clip: np.full((224, 398, 3), clip % 250, np.uint8))
    jpegs = [base64.b64decode(data) for data in re.findall(r"jpeg;base64,([^\"]+)", text)]
    assert {cv2.imdecode(np.frombuffer(j, np.uint8), cv2.IMREAD_COLOR).shape for j in jpegs} == {(135, 240, 3)}


def test_facts_are_in_the_headline(results: Results):
    text = render_page(results, read_frame=None, facts=["Evaluation dataset: demo.", "Training: 1 of 12 epochs."])
    assert "</code>. Evaluation dataset: demo. Training: 1 of 12 epochs. Input: 2 tube masks" in text


def test_without_caveats_there_is_no_such_section(page: Path):
    assert "Caveats" not in page.read_text()


def test_settings_are_those_of_the_results_and_of_each_network(results: Results):
    text = render_page(results, read_frame=None, settings={"Training": {"lr": 0.5}})
    settings = html.unescape(text[text.index("<summary>Settings</summary>") :])
    assert [part.split("</h3>")[0] for part in settings.split("<h3>")[1:]] == ["Protocol", "Networks", "Training"]
    protocol, networks, training = (json.loads(part.split("</pre>")[0]) for part in settings.split("<pre>")[1:])
    assert (protocol["episodes"], protocol["k_shot"]) == (40, [1, 5])
    assert [(n["network"], n["input_mode"]) for n in networks] == [(f.network, f.input_mode) for f in results.features]
    assert networks[0]["checkpoint"] == "/runs/student_rgb.ckpt"
    assert training == {"lr": 0.5}


def test_the_example_episode_is_typical(results: Results):
    row = results.headline
    chosen = row.scores.accuracy[typical_episode(row)]
    assert abs(chosen - row.scores.accuracy.mean()) == np.abs(row.scores.accuracy - row.scores.accuracy.mean()).min()
