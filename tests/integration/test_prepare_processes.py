"""Preparation, checks and the demo dataset in several processes, and after a kill."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from mmdistill.data.annotations.base import Rally
from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.demo.dataset import make_demo
from mmdistill.demo.scene import DemoParameters
from mmdistill.prepare.coverage import check_all
from mmdistill.prepare.pipeline import Settings, prepare_video
from tests.commands import ROOT
from tests.generated_video import write_moving_square


def file_contents(root: Path) -> dict[str, bytes]:
    """Content of every file below `root`, by relative path, without the records of the preparation."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.parent.name != ".prepared")
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_killed_preparation_is_completed_by_the_next_run(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi", frames=24)
    command = [sys.executable, ROOT / "scripts/prepare_data.py", video, "--output", tmp_path / "out", "--height", "48"]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    flows = tmp_path / "out/tennis_flows/a"
    while process.poll() is None and not (flows.exists() and len(list(flows.iterdir())) > 3):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert flows.exists()
    (flows / ".tmp-1-pair_00009.npy").write_bytes(b"half")  # what a kill during a write leaves
    for name in ("out", "uninterrupted"):
        prepare_video("a", video, tmp_path / name, Settings(height=48))
        for report in ("unlabel.json", "provenance.json"):
            (tmp_path / name / report).unlink(missing_ok=True)
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "uninterrupted")


def test_coverage_is_the_same_in_one_and_two_processes(tmp_path: Path) -> None:
    rallies = [Rally(f"m_{k}", 10, 25.0, ()) for k in range(3)]
    for rally, rows in zip(rallies[:2], (10, 8), strict=True):
        entry = {"keypoint": np.ones((2, rows, 17, 2)), "keypoint_score": np.ones((2, rows, 17)), "img_shape": (16, 24)}
        (tmp_path / f"{rally.video}.pkl").write_bytes(pickle.dumps(entry))
    readers: dict[str, Reader] = {"skeleton": SkeletonReader(tmp_path, frame_size=(16, 24))}
    done: list[str] = []
    report = check_all(rallies, readers, workers=2, progress=lambda coverage: done.append(coverage.video))
    assert sorted(done) == ["m_0", "m_1", "m_2"]
    assert report == check_all(rallies, readers, workers=1)
    assert report["modalities"]["skeleton"]["missing_frames"] == 2 + 10


def test_demo_has_the_same_bytes_from_one_and_two_processes(tmp_path: Path) -> None:
    earlier = set(multiprocessing.active_children())  # a pool that an earlier test has not ended yet
    for name, workers in (("one", 1), ("two", 2)):
        parameters = DemoParameters(strokes_per_class=(1, 1), frame_size=(32, 40))
        make_demo(tmp_path / name, parameters, workers=workers, progress=False)
    assert file_contents(tmp_path / "one") == file_contents(tmp_path / "two")
    assert set(multiprocessing.active_children()) <= earlier
