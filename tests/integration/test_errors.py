"""Error messages for wrong input, as `config.explain` prints them."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from mmdistill.builders import make_clip_loader
from mmdistill.config import PretrainConfig, explain
from mmdistill.data.annotations.base import AnnotationError
from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.rgb import RgbReader
from tests.tiny_data import make_tiny


def test_error_lists_all_problems_of_an_annotation_file(tmp_path: Path) -> None:
    """With rally and event, not only their number."""
    label = "near_deuce_stroke_fh_gs_CC_-_in"
    event = {"frame": 3, "label": label}
    rallies = [
        {"video": "a", "num_frames": 9, "fps": 25, "events": [event, event]},
        {"video": "b", "fps": 25, "events": [event]},
        {"video": "c", "num_frames": 9, "fps": 25, "events": [{"frame": 3, "label": ["a_b"]}]},
    ]
    (tmp_path / "bad.json").write_text(json.dumps(rallies))
    with pytest.raises(AnnotationError) as caught:
        load_f3set(tmp_path / "bad.json")
    message = explain(caught.value, PretrainConfig)
    for part in (
        "bad.json: 3 problems",
        "a, event 1: a duplicate",
        "b: the key 'num_frames'",
        "c, event 0",
        "mmdistill check-data",
    ):
        assert part in message


class _Frames:
    """A map-style dataset of one missing frame."""

    def __init__(self, root: Path) -> None:
        self.reader = RgbReader(root / "frames", frame_size=(32, 36))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> object:
        return self.reader.read("rally_T_0", [999])


def test_error_in_a_loader_worker_names_the_file(tmp_path: Path) -> None:
    """The loader prepends the worker's traceback to its message."""
    make_tiny(tmp_path, per_class=1)
    with pytest.raises(FrameError) as caught:
        next(iter(DataLoader(_Frames(tmp_path), num_workers=1)))
    assert str(caught.value).startswith("Caught MissingFileError in DataLoader worker")
    message = explain(caught.value, PretrainConfig)
    assert message == f"{tmp_path}/frames/rally_T_0/000999.jpg: no such rgb file"


class _LostBatch(str):
    """Raises when it is received, like a batch of a worker that dies at that moment."""

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return _reset, ()


def _reset() -> str:
    raise ConnectionResetError("Connection reset by peer")


class _DyingWorker:
    """A dataset whose worker breaks its connection first and dies 0.3 s later."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> object:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return _LostBatch()


def test_dead_worker_is_reported_if_its_connection_breaks_first() -> None:
    loader = iter(make_clip_loader(_DyingWorker(), num_workers=1, pin_memory=False))
    torch_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # would also raise, at an undefined time
    try:
        with pytest.raises(RuntimeError, match=r"DataLoader worker exited: \d+ \(SIGKILL\)"):
            next(loader)
    finally:
        signal.signal(signal.SIGCHLD, torch_handler)
