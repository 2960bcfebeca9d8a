"""The version of a dataset's pixels: the same until something that decides them changes, and cheap."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.clips import ClipIndex, build_index
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.fingerprint import data_fingerprint
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from tests.synthetic_dots import DotVideo


def _dataset(dot: DotVideo, index: ClipIndex | None = None, **changes: object) -> ClipDataset:
    index = index or build_index([Rally("dot", 24, 25.0, (Event(8, "a"),))], clips="events", num_frames=4)
    return ClipDataset(
        index, dot.readers(), **{"grid": (2, 4, 6), "crop_size": (64, 96), "frame_size": dot.size, **changes}
    )


@pytest.mark.parametrize(
    ("modality", "file", "needed"),
    [
        ("rgb", "frames/dot/000007.jpg", True),
        ("rgb", "frames/dot/000020.jpg", False),  # of no clip
        ("flow", "flow/dot/pair_00007.npy", True),
        ("skeleton", "skeleton/dot.pkl", True),
        ("rgb", "skeleton/dot.pkl", False),
    ],
)
def test_a_changed_file_gives_a_new_version_of_its_modality(
    dot: DotVideo, modality: str, file: str, needed: bool
) -> None:
    before, path = data_fingerprint(_dataset(dot), modality), dot.root / file
    assert data_fingerprint(_dataset(dot), modality) == before
    changed = path.stat().st_mtime_ns + 1000
    os.utime(path, ns=(changed, changed))  # another render of the same size
    touched = data_fingerprint(_dataset(dot), modality)
    assert (touched != before) == needed
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(changed, changed))
    longer = data_fingerprint(_dataset(dot), modality)
    assert (longer != touched) == needed
    path.unlink()
    assert (data_fingerprint(_dataset(dot), modality) != longer) == needed


def test_clips_and_settings_are_part_of_it(dot: DotVideo) -> None:
    base = _dataset(dot)
    clip = base.index.clips[0]
    fewer = ClipIndex((replace(clip, frames=clip.frames[1:]),), base.index.classes)
    others = [
        _dataset(dot, crop_size=(32, 96)),
        _dataset(dot, on_missing="repeat"),
        _dataset(dot, ClipIndex((clip,), ("b",))),
        _dataset(dot, fewer),
    ]
    versions = {data_fingerprint(ds, "skeleton") for ds in (base, *others)}
    assert len(versions) == 5
    base.readers["skeleton"] = SkeletonReader(dot.root / "skeleton", frame_size=dot.size, max_persons=1)
    assert data_fingerprint(base, "skeleton") not in versions
    base.readers["rgb"] = RgbReader(dot.root / "other", frame_size=dot.size)
    assert data_fingerprint(base, "rgb") != data_fingerprint(_dataset(dot), "rgb")


def test_a_file_costs_one_look_however_many_clips_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 frames of 2,000 overlapping clips of 200 videos; the files are not even there."""
    rallies = [Rally(f"r{i}", 200, 25.0, tuple(Event(8 + 10 * k, "a") for k in range(10))) for i in range(200)]
    index = build_index(rallies, clips="events", num_frames=16)
    reader = RgbReader(tmp_path, frame_size=(32, 48))
    ds = ClipDataset(index, {"rgb": reader}, grid=(8, 2, 3), crop_size=(32, 48), frame_size=(32, 48))
    looks: list[object] = []

    def watch(name: str) -> None:
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **options: (looks.append(args), original(*args, **options))[1])

    for name in ("stat", "scandir", "listdir"):
        watch(name)
    data_fingerprint(ds, "rgb")
    assert len(looks) == 200 * (9 * 10 + 16)  # of the 160 frames that each video's clips have, 106 are different ones
