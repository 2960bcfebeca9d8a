from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from mmdistill.evaluation.report.html_page import render_page, typical_episode
from mmdistill.fewshot.protocol import Results


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
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
    assert all(link.startswith("data:") for link in found.links)
    assert found.tags.count("figure") == 6
    assert found.tags.count("tr") > 30


def test_the_header_states_network_input_clips_and_glossary(results: Results, page: Path):
    text = page.read_text()
    assert "Scored network: <strong>student_rgb</strong> from <code>/runs/student_rgb.ckpt</code>. " in text
    assert "Input: 2 tube masks (242). Support and query clips come from different videos.</p>" in text
    assert "Terms: <code>docs/glossary.md</code> of mmdistill." in text
    assert "xcluded classes" not in text  # no class is excluded
    assert "Encoding time covers preprocessing" in text
    assert text.count("encoding\ntime (s)") == 4


def test_without_frames_there_is_no_example_episode(results: Results, page: Path):
    assert "<h2>Example episode</h2>" in page.read_text()
    assert "<h2>Example episode</h2>" not in render_page(results, read_frame=None, extra={}, embedding="pca")


def test_the_example_episode_is_typical(results: Results):
    row = results.headline
    chosen = row.scores.accuracy[typical_episode(row)]
    assert abs(chosen - row.scores.accuracy.mean()) == np.abs(row.scores.accuracy - row.scores.accuracy.mean()).min()
