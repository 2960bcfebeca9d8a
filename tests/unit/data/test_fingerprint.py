"""The fingerprint of a dataset: it changes with anything that determines the samples, and opens no file."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.clips import ClipIndex, ClipSpec, build_index
from mmdistill.data.dataset import ClipDataset, CropSpec
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.data.masking import MaskSpec
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from tests.synthetic_dots import DotVideo


def _dataset(dot: DotVideo, index: ClipIndex | None = None, **changes: object) -> ClipDataset:
    index = index or build_index([Rally("dot", 24, 25.0, (Event(8, "a"),))], ClipSpec("events", 4))
    crop = CropSpec(dot.size, changes.pop("crop_size", (64, 96)))  # type: ignore[arg-type]
    return ClipDataset(index, dot.readers(), crop, MaskSpec((2, 4, 6)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modality", "file", "needed"),
    [
        ("rgb", "frames/dot/000007.jpg", True),
        ("rgb", "frames/dot/000020.jpg", False),  # in no clip
        ("flow", "flow/dot/pair_00007.npy", True),
        ("skeleton", "skeleton/dot.pkl", True),
        ("rgb", "skeleton/dot.pkl", False),
    ],
)
def test_changed_file_changes_the_fingerprint_of_its_modality(
    dot: DotVideo, modality: str, file: str, needed: bool
) -> None:
    before, path = data_fingerprint(_dataset(dot), modality), dot.root / file
    assert data_fingerprint(_dataset(dot), modality) == before
    changed = path.stat().st_mtime_ns + 1000
    os.utime(path, ns=(changed, changed))  # a rewritten file of the same size
    touched = data_fingerprint(_dataset(dot), modality)
    assert (touched != before) == needed
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(changed, changed))
    longer = data_fingerprint(_dataset(dot), modality)
    assert (longer != touched) == needed
    path.unlink()
    assert (data_fingerprint(_dataset(dot), modality) != longer) == needed


def test_clips_and_settings_change_the_fingerprint(dot: DotVideo) -> None:
    base = _dataset(dot)
    clip = base.index.clips[0]
    fewer = ClipIndex((replace(clip, frames=clip.frames[1:]),), base.index.classes)
    others = [
        _dataset(dot, crop_size=(32, 96)),
        _dataset(dot, on_missing="repeat"),
        _dataset(dot, ClipIndex((clip,), ("b",))),
        _dataset(dot, fewer),
    ]
    fingerprints = {data_fingerprint(ds, "skeleton") for ds in (base, *others)}
    assert len(fingerprints) == 5
    base.readers["skeleton"] = SkeletonReader(dot.root / "skeleton", frame_size=dot.size, max_persons=1)
    assert data_fingerprint(base, "skeleton") not in fingerprints
    base.readers["rgb"] = RgbReader(dot.root / "other", frame_size=dot.size)
    assert data_fingerprint(base, "rgb") != data_fingerprint(_dataset(dot), "rgb")


def test_each_file_and_each_folder_needs_one_stat_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 frames of 2,000 overlapping clips of 200 videos. The files do not exist."""
    rallies = [Rally(f"r{i}", 200, 25.0, tuple(Event(8 + 10 * k, "a") for k in range(10))) for i in range(200)]
    index = build_index(rallies, ClipSpec("events", 16))
    reader = RgbReader(tmp_path, frame_size=(32, 48))
    ds = ClipDataset(index, {"rgb": reader}, CropSpec((32, 48), (32, 48)), MaskSpec((8, 2, 3)))
    calls: list[object] = []

    def watch(name: str) -> None:
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **options: (calls.append(args), original(*args, **options))[1])

    for name in ("stat", "scandir", "listdir"):
        watch(name)
    data_fingerprint(ds, "rgb")
    # of the 160 frames that each video's clips have, 106 are different ones; one more call looks for frames.zip
    assert len(calls) == 200 * (9 * 10 + 16 + 1)
