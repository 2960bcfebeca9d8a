"""The page of a labeled video: its size and its timeline. tests/unit/cli/test_label.py compares it with the files."""

import re
from pathlib import Path

import pytest

from mmdistill.evaluation.report import label_page
from mmdistill.evaluation.report.label_page import render_label_page, write_labels
from tests.labeled_videos import make_labeled_video


def test_the_page_is_self_contained_and_escaped():
    page = render_label_page(make_labeled_video())
    assert "&lt;fh&gt;" in page
    assert "<fh>" not in page
    assert "<script" not in page
    links = re.findall(r'(?:src|href)="([^"]+)"|url\(([^)]+)\)', page)
    assert all("".join(link).startswith(("data:", "#stroke-", "#labels")) for link in links)
    assert page.count(".e0 {") == 1  # the image of an example is stored once
    assert page.count('class="shot e0"') == 12


def test_frames_of_a_strip_lie_around_the_stroke_and_in_the_video():
    page = render_label_page(make_labeled_video())
    strips = dict(re.findall(r'id="stroke-(\d+)">.*?<p class="note">frames ([\d, ]+)</p>', page, flags=re.DOTALL))
    assert strips["20"] == "14, 16, 18, 20, 22, 24, 26"
    assert strips["0"] == "0, 2, 4, 6"


def test_images_shrink_and_then_the_most_certain_strokes_have_none(monkeypatch: pytest.MonkeyPatch):
    full = len(render_label_page(make_labeled_video()))
    monkeypatch.setattr(label_page, "MAX_PAGE_BYTES", full - 1)
    page = render_label_page(make_labeled_video())
    assert len(page) < full
    assert page.count('class="film"') == 12
    limit = full // 2
    monkeypatch.setattr(label_page, "MAX_PAGE_BYTES", limit)
    page = render_label_page(make_labeled_video())
    count = page.count('class="film"')
    assert 0 < count < 12
    assert len(page) <= limit
    assert f"Only the {count} least certain strokes have images" in page
    assert page.count("<article") == 12


def test_a_long_video_has_several_rows_of_time():
    page = render_label_page(make_labeled_video(num_frames=7200 * 25))
    starts = re.findall(r'<text x="0" y="45">(.*?)</text>', page)
    assert len(starts) == 24
    assert starts[:2] == ["0:00:00.000", "0:05:00.000"]
    assert "180000 frames (2:00:00.000, 25 frames per second)" in page


def test_without_a_frame_rate_the_axis_has_frames(tmp_path: Path):
    video = make_labeled_video(fps=-1.0)
    assert '<text x="0" y="45">frame 0</text>' in render_label_page(video)
    paths = write_labels(video, tmp_path / "out")
    assert [path.name for path in paths] == ["strokes.json", "strokes.csv", "strokes.html"]
    assert paths[1].read_text().splitlines()[1] == "new,,0,<fh>,0.5000,proposal"


def test_a_page_without_strokes_says_what_to_do():
    page = render_label_page(make_labeled_video(num_strokes=0))
    assert "No stroke was found. Lower --threshold, or give more examples." in page
    assert "0 proposed strokes in 60 frames" in page
