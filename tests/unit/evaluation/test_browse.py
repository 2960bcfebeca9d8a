"""The page of ``mmdistill browse``: index, label statistics, pictures and errors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdistill.config import ConfigError
from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.clips import ClipSpec, ClipTable, build_index
from mmdistill.evaluation import browse
from mmdistill.evaluation.browse import (
    CLASSES,
    WHOLE_LABEL,
    BrowseOptions,
    BrowsePage,
    class_elements,
    label_granularities,
    make_index,
)
from tests.browse_data import browse_config, write_evaluation
from tests.tiny_data import make_tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("browse") / "data")


@pytest.fixture(scope="module")
def page(data: Path) -> tuple[str, list[str]]:
    config = browse_config(data, "data_module.label_fields=[direction,type]")
    evaluation = write_evaluation(config, data.parent)
    return BrowsePage(config, BrowseOptions(evaluation=evaluation, clips=6, errors=2)).render()


def test_the_page_states_how_many_clips_it_shows(page: tuple[str, list[str]]) -> None:
    text, lines = page
    assert lines[:2] == ["index: 24 of 24 clips, 24 of 24 videos", "pictures: 6 of 24 clips"]
    assert re.fullmatch(r"errors: 2 of \d+ clips with an error", lines[2])
    assert all(f"<li>{line}</li>" in text for line in lines)
    assert len(re.findall(r'<figure id="clip-\d+">', text)) == 6
    assert text.count("(2 of 6 clips)") == 2
    assert text.count("(1 of 6 clips)") == 2
    assert "Rows of a picture: input, flow, skeleton, mask." in text


def test_the_page_makes_no_request_and_runs_only_its_own_script(page: tuple[str, list[str]]) -> None:
    text, _ = page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-[\w+/=]+'", policy[1]
    )


def read_index(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="index">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    index: dict[str, Any] = json.loads(found[1])
    return index


def test_the_index_has_the_whole_label_of_each_frame(page: tuple[str, list[str]], data: Path) -> None:
    index = read_index(page[0])
    found = {
        (video, frame): index["labels"][label]
        for video, row in zip(index["videos"], index["rows"], strict=True)
        for frame, label, start in np.reshape(row, (-1, 3)).tolist()
        if start == 4  # the event at frame 6 is the third frame of four
    }
    rallies = json.loads((data / "val.json").read_text())
    assert found == {(r["video"], e["frame"]): e["label"] for r in rallies for e in r["events"]}
    assert index["span"] == 4


def test_errors_show_the_query_the_support_clips_and_the_elements(page: tuple[str, list[str]]) -> None:
    text = page[0]
    cards = text[text.index('<section id="errors">') :].split('<div class="card">')[1:]
    assert len(cards) == 2
    for card in cards:
        assert re.search(r"wrong in \d+ of\s+\d+ episodes?; predicted:\s+stroke_<mark>\w+</mark>", card)
        assert card.count('alt="support clip') in (3, 4)
        assert ", true class" in card
    assert re.search(r"<td>direction</td><td>100.0</td><td>100.0</td>", text)
    assert re.search(r"<td>type</td><td>0.0</td><td>0.0</td>", text)


def test_statistics_of_each_granularity(page: tuple[str, list[str]]) -> None:
    rows = re.findall(r"<tr><td>([^<]+)</td><td>(\d+)</td><td>(\d+)</td><td>([\d.]+)</td><td>(\d+)</td>(.*)", page[0])
    assert len(rows) == 2 * 10
    assert rows[0][:5] == (WHOLE_LABEL, "4", "6", "6", "6")
    assert re.findall(r"<td>(.+?)</td>", rows[0][5]) == ["4", "4", "–", "4", "–", "–"]  # K + Q = 2, 6, 16, 6, 10, 20
    assert rows[1][:2] == (CLASSES, "4")
    assert rows[2][:5] == ("player", "1", "24", "24", "24")


def test_training_clips_without_labels(data: Path) -> None:
    config = browse_config(data)
    text, lines = BrowsePage(config, BrowseOptions(split="unlabel", clips=1, modalities=("flow",))).render()
    assert lines[1] == f"pictures: 1 of {len(read_index(text)['rows'][0]) // 3 * 24} clips"
    assert "No clip has a label, so no episode is possible." in text
    assert "Rows of a picture: input, flow, mask." in text
    assert "The crop is that of the training in epoch 0." in text


def test_a_label_with_markup_is_text(data: Path, tmp_path: Path) -> None:
    rallies = json.loads((data / "val.json").read_text())
    rallies[0]["events"][0]["label"] = "</script><script>alert(1)</script>"
    (tmp_path / "val.json").write_text(json.dumps(rallies))
    config = browse_config(data, f"data_module.fewshot_eval_json_path={tmp_path / 'val.json'}")
    text, _ = BrowsePage(config, BrowseOptions(clips=4, modalities=("rgb",))).render()
    assert "<script>alert(1)" not in text
    assert "</script><script>alert(1)</script>" in read_index(text)["labels"]
    assert text.count("<script") == 2


def test_the_pictures_end_at_the_limit(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browse, "MAX_PICTURE_BYTES", 20_000)
    text, lines = BrowsePage(browse_config(data), BrowseOptions()).render()
    shown = int(re.findall(r"pictures: (\d+) of 24 clips", lines[1])[0])
    assert 0 < shown < 24
    assert sum(map(len, re.findall(r'src="(data:[^"]+)"', text))) <= 20_000


def large_table(num_videos: int) -> ClipTable:
    events = tuple(Event(frame, f"label_{frame % 50}") for frame in range(20, 420, 40))
    rallies = [
        Rally(f"20200101-M-Tournament-R16-Player_{i}_{i}_{i + 999}", 1000, 25, events) for i in range(num_videos)
    ]
    index = build_index(rallies, ClipSpec("events", 16))
    assert isinstance(index.clips, ClipTable)
    return index.clips


def test_the_index_is_complete_up_to_its_limit_and_then_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = large_table(200)
    classes = tuple(f"label_{n}" for n in range(50))
    index, count = make_index(table, classes)
    assert (len(index["videos"]), count) == (200, 2000)
    monkeypatch.setattr(browse, "MAX_INDEX_BYTES", 10_000)
    small, count = make_index(table, classes)
    assert 0 < count < 2000
    assert small["videos"] == index["videos"][: len(small["videos"])]
    assert count == 10 * len(small["videos"])
    assert len(browse.dump_json(small)) < 11_000


def test_the_limits_of_index_and_pictures_leave_room_below_10_mb() -> None:
    assert browse.MAX_INDEX_BYTES + browse.MAX_PICTURE_BYTES <= 9_000_000


def test_granularities_of_other_labels(data: Path) -> None:
    config = browse_config(data).data_module
    assert list(label_granularities(["a_b", "c_d", ""], config)) == [WHOLE_LABEL, "field_0", "field_1"]
    assert label_granularities(["a_b", "c_d", ""], config)["field_1"] == ["b", "d", ""]
    assert list(label_granularities(["take", "put_down"], config)) == [WHOLE_LABEL]
    named = browse_config(data, "data_module.label_fields=[direction]").data_module
    with pytest.raises(ConfigError, match=r"label 'a_b' has 2 fields"):
        label_granularities(["a_b"], named)


def test_elements_of_classes_have_the_names_of_the_fields(data: Path) -> None:
    named = browse_config(data, "data_module.label_fields=[direction,type]").data_module
    assert class_elements(["serve_T", "stroke_CC"], named).names == ("type", "direction")
    numbered = browse_config(data, "data_module.label_fields=['2','0']").data_module
    assert class_elements(["a_b", "c_d"], numbered).names == ("field_0", "field_2")
