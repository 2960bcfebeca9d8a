"""The demo dataset: the layout of the real data, resumable, and files that agree with each other."""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from filelock import SoftFileLock, Timeout

from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.readers.flow_file import read_flow
from mmdistill.data.readers.safe_pickle import load_pickle
from mmdistill.demo import dataset
from mmdistill.demo.dataset import FORMAT, make_demo, rally_record
from mmdistill.demo.scene import DemoError, DemoParameters, plan_rallies
from mmdistill.demo.strokes import STROKES
from tests.unit.demo.conftest import ONE_STROKE_PER_CLASS

MAX_DATASET_BYTES = 60e6


def file_contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def modification_times(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".demo.lock"}


def test_layout_is_that_of_the_tennis_data(demo_root: Path) -> None:
    rallies = [rally for split in ("train", "val") for rally in load_f3set(demo_root / f"{split}.json")]
    assert len(rallies) == 4
    for rally in rallies:
        frames = sorted(p.name for p in (demo_root / "vid_frames_224" / rally.video).iterdir())
        assert frames == [f"{k:06d}.jpg" for k in range(rally.num_frames)]
        pairs = sorted(p.name for p in (demo_root / "tennis_flows" / rally.video).iterdir())
        assert pairs == [f"pair_{k:05d}.npy" for k in range(rally.num_frames - 1)]
        assert cv2.imread(str(demo_root / "vid_frames_224" / rally.video / frames[-1])).shape == (64, 68, 3)
        assert read_flow(demo_root / "tennis_flows" / rally.video / pairs[0]).shape == (2, 64, 68)
        skeleton = load_pickle(demo_root / "skeletons" / "f3set-tennis" / f"{rally.video}.pkl")
        assert skeleton["keypoint"].shape == (2, rally.num_frames, 17, 2)
        assert skeleton["keypoint"].dtype == np.float32
        assert skeleton["keypoint_score"].shape == (2, rally.num_frames, 17)
        assert skeleton["total_frames"] == rally.num_frames
        assert tuple(skeleton["img_shape"]) == (64, 68)
    assert not list(demo_root.rglob(".tmp-*"))


def test_unlabeled_rallies_are_the_training_rallies(demo_root: Path) -> None:
    assert (demo_root / "unlabel.json").read_bytes() == (demo_root / "train.json").read_bytes()


def test_records_have_the_keys_of_f3set(demo_root: Path) -> None:
    record = json.loads((demo_root / "val.json").read_text())[0]
    expected = {"fps", "height", "width", "num_frames", "video", "events"}
    expected |= {f"{who}_{what}" for who in ("near", "far") for what in ("name", "hand", "set", "game", "point")}
    assert set(record) == expected
    assert set(record["events"][0]) == {"frame", "label", "outcome"}


def test_labels_have_eight_fields_and_the_class_of_the_stroke() -> None:
    parameters = DemoParameters()
    for plan in plan_rallies(parameters):
        for stroke, event in zip(plan.strokes, rally_record(plan, parameters)["events"], strict=True):
            fields = event["label"].split("_")
            assert len(fields) == 8
            assert tuple(fields[2:6]) == STROKES[stroke].fields
            assert fields[0] == "near"
            assert fields[1] in ("deuce", "middle", "ad")
            assert fields[6] in ("-", "approach")
            assert fields[7] == event["outcome"] in ("in", "winner", "forced-err", "unforced-err")


def test_parameters_of_a_format_define_plans_and_annotations() -> None:
    """A change of these bytes needs a new FORMAT, so that existing folders are not mixed with new files."""
    parameters = DemoParameters()
    records = [rally_record(plan, parameters) for plan in plan_rallies(parameters)]
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    assert (FORMAT, digest[:16]) == (6, "2b533423379c8fad")


def test_default_size_is_below_the_limit(demo_root: Path) -> None:
    written = sum(
        p.stat().st_size for kind in ("vid_frames_224", "tennis_flows") for p in (demo_root / kind).rglob("*.*")
    )
    frames = sum(r.num_frames for split in ("train", "val") for r in load_f3set(demo_root / f"{split}.json"))
    default_frames = sum(plan.num_frames for plan in plan_rallies(DemoParameters()))
    skeletons = default_frames * 2 * 17 * 3 * 4
    assert written / frames * default_frames + skeletons + 0.5e6 < MAX_DATASET_BYTES


def test_complete_dataset_is_not_changed(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = modification_times(demo_root)
    monkeypatch.setattr(dataset, "write_rally", lambda *_: pytest.fail("rendered again"))
    make_demo(demo_root, ONE_STROKE_PER_CLASS, workers=1, progress=False)
    assert before == modification_times(demo_root)


def test_complete_dataset_can_be_read_only(demo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "FileLock", lambda path: pytest.fail(f"{path} is created"))
    make_demo(demo_root, ONE_STROKE_PER_CLASS, workers=1, progress=False)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with dataset._acquire_lock(tmp_path):
        assert (tmp_path / ".demo.softlock").exists()
        with pytest.raises(Timeout):
            SoftFileLock(tmp_path / ".demo.softlock").acquire(timeout=0)
    assert not (tmp_path / ".demo.softlock").exists()


@pytest.mark.parametrize("lost", ["vid_frames_224/{}/000003.jpg", "tennis_flows/{}", "skeletons/f3set-tennis/{}.pkl"])
def test_only_missing_rallies_are_rendered(
    demo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(demo_root, copy)
    path = copy / lost.format("demo_val_000")
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (copy / "demo.json").rename(copy / "demo.partial.json")  # as after an interruption of the first run
    rendered: list[str] = []
    write_rally = dataset.write_rally

    def record_rally(*args: object) -> str:
        rendered.append(write_rally(*args))  # type: ignore[arg-type]
        return rendered[-1]

    monkeypatch.setattr(dataset, "write_rally", record_rally)
    make_demo(copy, ONE_STROKE_PER_CLASS, workers=1, progress=False)
    assert rendered == ["demo_val_000"]
    assert file_contents(copy) == file_contents(demo_root)


@pytest.mark.parametrize("name", ["demo.json", "demo.partial.json"])
def test_dataset_with_other_parameters_is_rejected(demo_root: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(demo_root / "demo.json", tmp_path / name)
    with pytest.raises(DemoError, match=r"nuisance is 0\.3, requested 0\.1"):
        make_demo(tmp_path, replace(ONE_STROKE_PER_CLASS, nuisance=0.1), workers=1, progress=False)


def test_annotations_of_another_dataset_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "unlabel.json").write_text("[]")
    with pytest.raises(DemoError, match=r"contains unlabel\.json of another dataset, .* set dataset=NAME"):
        make_demo(tmp_path, ONE_STROKE_PER_CLASS, workers=1, progress=False)
    assert (tmp_path / "unlabel.json").read_text() == "[]"


def test_flow_pair_k_is_the_motion_from_frame_k_to_the_next(demo_root: Path) -> None:
    """The flow at torso joints is their displacement. Neighboring pairs and the opposite sign fit worse."""
    torso = [5, 6, 11, 12]
    errors: dict[str, list[np.ndarray]] = {"same": [], "previous": [], "next": [], "opposite": []}
    for rally in load_f3set(demo_root / "train.json"):
        points = load_pickle(demo_root / "skeletons" / "f3set-tennis" / f"{rally.video}.pkl")["keypoint"][0]
        folder = demo_root / "tennis_flows" / rally.video
        flows = [read_flow(folder / f"pair_{k:05d}.npy") for k in range(rally.num_frames - 1)]
        for k in range(1, rally.num_frames - 2):
            moved = points[k + 1, torso] - points[k, torso]
            selected = (np.linalg.norm(moved, axis=1) > 1.0) & (np.linalg.norm(moved, axis=1) < 4.0)
            x, y = np.rint(points[k, torso]).astype(int).T
            for name, pair, sign in (("same", k, 1), ("previous", k - 1, 1), ("next", k + 1, 1), ("opposite", k, -1)):
                error = np.linalg.norm(sign * flows[pair][:, y, x].T - moved, axis=1)
                errors[name].append(error[selected])
    median = {name: float(np.median(np.concatenate(values))) for name, values in errors.items()}
    assert median["same"] < 1.0
    assert median["same"] < 0.7 * min(median["previous"], median["next"], median["opposite"])


def test_progress_is_printed_as_lines_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    parameters = DemoParameters(strokes_per_class=(1, 1), strokes_per_rally=12, frame_size=(32, 40))
    make_demo(tmp_path, parameters, workers=1)
    assert "demo data, rallies 2/2" in capfd.readouterr().err
    assert len(list((tmp_path / "vid_frames_224").iterdir())) == 2
