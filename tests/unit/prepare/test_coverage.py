"""The coverage check counts exactly what was broken, and its exit status says so."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.annotations.f3set import load_f3set, to_json
from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.prepare.coverage import check_all
from tests.commands import Script

SIZE = (16, 24)
FRAMES = 10
LABEL = "near_deuce_serve_-_-_T_-_in"
RALLIES = [Rally(name, FRAMES, 25.0, (Event(3, LABEL),)) for name in ("m_1_10", "m_20_30")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for rally in RALLIES:
        for folder in ("vid_frames_224", "tennis_flows", "skeletons/f3set-tennis"):
            (tmp_path / folder / rally.video).mkdir(parents=True)
        (tmp_path / "skeletons/f3set-tennis" / rally.video).rmdir()
        for k in range(FRAMES):
            picture = np.full((*SIZE, 3), 20 * k, np.uint8)
            cv2.imwrite(str(tmp_path / f"vid_frames_224/{rally.video}/{k:06d}.jpg"), picture)
            if k < FRAMES - 1:
                flow = np.zeros((2, *SIZE), np.float32)
                write_flow(tmp_path / f"tennis_flows/{rally.video}/pair_{k:05d}.npy", flow)
        skeleton(tmp_path, rally.video)
    (tmp_path / "a.json").write_text(json.dumps(to_json(RALLIES)))
    return tmp_path


def skeleton(root: Path, video: str, *, frames: int = FRAMES, bad: bool = False) -> None:
    scores = np.ones((2, frames, 17))
    scores[1, : frames // 2] = 0
    entry = {
        "keypoint": np.ones((2, frames, 17, 2)),
        "keypoint_score": scores,
        "total_frames": frames,
        "img_shape": (160, 240),
    }
    if bad:
        entry["keypoint"][0, 4] = np.nan  # type: ignore[index]
    (root / f"skeletons/f3set-tennis/{video}.pkl").write_bytes(pickle.dumps(entry))


def readers(root: Path) -> dict[str, Reader]:
    return {
        "rgb": RgbReader(root / "vid_frames_224", frame_size=SIZE),
        "flow": FlowReader(root / "tennis_flows", frame_size=SIZE),
        "skeleton": SkeletonReader(root / "skeletons/f3set-tennis", frame_size=SIZE),
    }


def test_whole_data_is_complete(root: Path) -> None:
    report = check_all(RALLIES, readers(root), workers=1)
    assert report["complete"]
    assert report["modalities"]["rgb"]["frames"] == 20
    assert report["modalities"]["flow"]["frames"] == 18
    assert report["players"] == {"near": {"frames": 20, "share": 1.0}, "far": {"frames": 10, "share": 0.5}}


def break_things(root: Path) -> None:
    frames, flows = root / "vid_frames_224/m_1_10", root / "tennis_flows/m_20_30"
    (frames / "000002.jpg").unlink()
    (frames / "000003.jpg").write_bytes((frames / "000003.jpg").read_bytes()[:-40])
    cv2.imwrite(str(frames / "000004.jpg"), np.zeros((8, 8, 3), np.uint8))
    (flows / "pair_00000.npy").unlink()
    np.save(flows / "pair_00001.npy", np.zeros((2, 3, 4), np.float32))
    (root / "vid_frames_224/m_20_30/000010.jpg").write_bytes(b"")
    skeleton(root, "m_1_10", bad=True)
    (root / "skeletons/f3set-tennis/m_20_30.pkl").unlink()


def test_every_kind_of_gap_is_counted_and_named(root: Path) -> None:
    break_things(root)
    report = check_all(RALLIES, readers(root), workers=1)
    assert not report["complete"]
    gaps = report["rallies_with_gaps"]
    assert gaps["m_1_10"]["rgb"] == {"absent": 1, "unreadable": 2, "longer_than_annotated": False}
    assert gaps["m_1_10"]["skeleton"] == {"absent": 0, "unreadable": 1, "longer_than_annotated": False}
    assert gaps["m_20_30"]["rgb"] == {"absent": 0, "unreadable": 0, "longer_than_annotated": True}
    assert gaps["m_20_30"]["flow"] == {"absent": 1, "unreadable": 1, "longer_than_annotated": False}
    assert gaps["m_20_30"]["skeleton"]["absent"] == 10
    assert report["modalities"]["skeleton"]["rallies_without"] == 1
    text = "\n".join(report["messages"])
    for part in ("000003.jpg: truncated JPEG", "000004.jpg: 8 x 8 px", "pair_00001.npy: shape (2, 3, 4)", "frame 4"):
        assert part in text


def test_skeletons_of_another_length_are_named(root: Path) -> None:
    skeleton(root, "m_1_10", frames=8)
    report = check_all(RALLIES, readers(root), workers=1)
    assert report["rallies_with_gaps"]["m_1_10"]["skeleton"]["absent"] == 2
    assert "8 rows, but the annotation has 10 frames" in report["messages"][0]


def test_the_script_prints_a_table_and_a_status(root: Path, script: Script) -> None:
    arguments = [root / "a.json", "--root", root, "--frame-size", 16, 24, "--workers", 2, "--json", root / "r.json"]
    break_things(root)
    done = script("check_data.py", *arguments)
    assert done.returncode == 1
    assert "gaps in 2 rallies" in done.stdout
    assert "near player: " in done.stdout
    assert json.loads((root / "r.json").read_text())["modalities"]["flow"]["absent"] == 1


def test_mistakes_in_annotations_are_shown_and_can_be_left_out(tmp_path: Path, script: Script) -> None:
    entry = to_json(RALLIES)[0]
    entry["events"] = [{"frame": f, "label": LABEL} for f in (5, 3, 3, 99)]
    (tmp_path / "a.json").write_text(json.dumps([entry, {"video": "x"}]))
    done = script("check_data.py", tmp_path / "a.json", "--write-clean", tmp_path / "clean.json")
    assert done.returncode == 1
    for part in ("m_1_10, event 1", "event 2: a duplicate", "event 3: frame=99 is out of range", "x: the key"):
        assert part in done.stdout
    assert [e.frame for e in load_f3set(tmp_path / "clean.json")[0].events] == [3, 5]
    assert script("check_data.py", tmp_path / "none.json").returncode == 2


def test_unlabelled_files(tmp_path: Path, root: Path, script: Script) -> None:
    other = [Rally("m_50_60", 10, 25.0, ()), Rally("other_1_2", 10, 25.0, ())]
    (tmp_path / "b.json").write_text(json.dumps(to_json(other)))
    out = tmp_path / "new" / "unlabel.json"  # its folder is made
    assert script("make_unlabel.py", root / "a.json", tmp_path / "b.json", "--output", out).returncode == 0
    rallies = load_f3set(out)
    assert len(rallies) == 4
    assert all(rally.events == () for rally in rallies)
    assert "serve" not in out.read_text()
    done = script(
        "make_unlabel.py", tmp_path / "b.json", "--output", out, "--exclude", root / "a.json", "--by", "match"
    )
    assert done.returncode == 0
    assert [r.video for r in load_f3set(out)] == ["other_1_2"]
    assert script("make_unlabel.py", root / "a.json", root / "a.json", "--output", out).returncode == 2
    done = script("make_unlabel.py", root / "a.json", "--output", out, "--exclude", root / "a.json")
    assert (done.returncode, "no rally is left" in done.stderr) == (2, True)
