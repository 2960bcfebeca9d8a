"""The command ``convert-skeletons``."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mmdistill.cli.convert_skeletons import main


def test_annotations_are_counted_and_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"frame_dir": video, "label": video, "keypoint": np.ones((1, 4, 17, 2))} for video in "ab"]
    (tmp_path / "all.pkl").write_bytes(pickle.dumps({"annotations": entries}))
    assert main([str(tmp_path / "all.pkl"), "--output", str(tmp_path / "out")]) == 0
    assert f"{tmp_path / 'out/annotations.json'}: 2 rallies, 2 events, 2 labels" in capsys.readouterr().out
    assert main([str(tmp_path / "none.pkl"), "--output", str(tmp_path / "out")]) == 2
    assert "none.pkl" in capsys.readouterr().err
