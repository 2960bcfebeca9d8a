"""The data report of a run: counts, summaries, file."""

import json
from pathlib import Path
from typing import Any

import torch

from mmdistill.data.clips import ClipIndex
from mmdistill.training.data_report import DataReport, missing_line, modality_sums

INDEX = {"rallies": 24, "too_short": [], "without_events": [], "shifted_into_video": 0}
NONE_MISSING: dict[str, Any] = {
    "policy": "error",
    "clips": 72,
    "clips_skipped": {},
    "frames_repeated": {},
    "clips_replaced": {},
}


class _Dataset:
    """What `DataReport` reads of a `ClipDataset`."""

    def __init__(self, index: dict[str, Any], missing: dict[str, Any]) -> None:
        self.readers = {"rgb": None, "flow": None}
        self.stats_tensor = torch.zeros(72, 3, dtype=torch.int16)
        self.index = ClipIndex((), (), index)
        self._missing = missing

    def missing_report(self, stats: torch.Tensor) -> dict[str, Any]:
        assert stats.shape == (72, 3)
        return self._missing


def _report(run_dir: Path, index: dict[str, Any], missing: dict[str, Any], *, is_main: bool = True) -> DataReport:
    return DataReport(_Dataset(index, missing), run_dir, is_main=is_main)  # type: ignore[arg-type]


def test_nothing_is_printed_about_missing_data_if_none_is_missing(tmp_path: Path) -> None:
    report = _report(tmp_path / "run", INDEX, NONE_MISSING)
    assert report.start_summary() == "data: 72 clips of 24 rallies"
    assert report.end_summary() == ""
    assert missing_line(NONE_MISSING, ["rgb"]) == ""
    stored = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert stored["modalities"]["rgb"] == {"clips_skipped": 0, "frames_repeated": 0}


def test_summaries_name_each_count(tmp_path: Path) -> None:
    index = {"rallies": 24, "too_short": ["a", "b"], "without_events": ["c"], "shifted_into_video": 5}
    missing = {
        **NONE_MISSING,
        "policy": "repeat",
        "clips_skipped": {"flow": {"a": 1, "b": 2}},
        "frames_repeated": {"rgb": {"a": 4}},
        "clips_replaced": {"c": 6},
    }
    report = _report(tmp_path, index, missing)
    line = (
        "missing data (on_missing=repeat): rgb: 4 frames repeated; flow: 3 clips skipped; "
        "6 clips replaced by other clips"
    )
    assert report.start_summary() == (
        "data: 72 clips of 24 rallies; 2 rallies too short for a clip; 1 rally without an event; "
        f"5 clips near the start or end of a video moved inside it; {line}"
    )
    assert report.end_summary() == f"data: {line}; details in {tmp_path / 'data_report.json'}"
    assert modality_sums(missing, "flow") == {"clips_skipped": 3, "frames_repeated": 0}


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    assert _report(tmp_path, INDEX, NONE_MISSING, is_main=False).write()["missing"] == NONE_MISSING
    assert list(tmp_path.iterdir()) == []
