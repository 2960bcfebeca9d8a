"""The command ``check-data``: its tables, its exit status and the cleaned annotation file."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.cli import check_data
from mmdistill.cli.check_data import main
from mmdistill.data.annotations.base import Event, Player, Rally
from mmdistill.data.annotations.f3set import load_f3set, to_json
from mmdistill.data.readers.flow_file import write_flow

SIZE, FRAMES = (16, 24), 6
LABEL = "near_deuce_serve_-_-_T_-_in"
RALLIES = [Rally(name, FRAMES, 25.0, (Event(3, LABEL),)) for name in ("m_1_10", "m_20_30")]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two rallies in the tennis layout; the far player has a skeleton in 4 of 6 frames."""
    monkeypatch.setenv("COLUMNS", "160")
    scores = np.ones((2, FRAMES, 17))
    scores[1, 4:] = 0
    entry = {
        "keypoint": np.ones((2, FRAMES, 1, 2)) * np.arange(17)[:, None] / 2 + 1,
        "keypoint_score": scores,
        "img_shape": SIZE,
    }
    (tmp_path / "skeletons/f3set-tennis").mkdir(parents=True)
    for rally in RALLIES:
        frames, flows = tmp_path / "vid_frames_224" / rally.video, tmp_path / "tennis_flows" / rally.video
        frames.mkdir(parents=True)
        flows.mkdir(parents=True)
        for k in range(FRAMES):
            cv2.imwrite(str(frames / f"{k:06d}.jpg"), np.full((*SIZE, 3), 20 * k, np.uint8))
            if k < FRAMES - 1:
                write_flow(flows / f"pair_{k:05d}.npy", np.zeros((2, *SIZE), np.float32))
        (tmp_path / f"skeletons/f3set-tennis/{rally.video}.pkl").write_bytes(pickle.dumps(entry))
    (tmp_path / "a.json").write_text(json.dumps(to_json(RALLIES)))
    return tmp_path


def check(root: Path, *more: object) -> int:
    options = ["--root", root, "--frame-size", *SIZE, "--workers", 1, *more]
    return main([str(root / "a.json"), *map(str, options)])


def test_complete_data_exits_with_0(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(root) == 0
    text = capsys.readouterr().out
    assert f"{root / 'a.json'}: 2 rallies, 2 events, 1 label" in text
    titles = ("expected frames", "missing frames", "unreadable frames", "frames of a wrong size")
    for title in (*titles, "rallies without any file"):
        assert title in text
    assert "rallies longer than annotated" in text
    assert "near player found in 12 of 12 frames (100.0 %)" in text
    assert "far player found in 8 of 12 frames (66.7 %)" in text
    assert text.rstrip().endswith("complete")


def test_a_player_in_less_than_half_of_the_frames_is_a_gap(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "skeletons/f3set-tennis/m_1_10.pkl"
    entry = pickle.loads(path.read_bytes())
    entry["keypoint_score"][1, 2:] = 0
    path.write_bytes(pickle.dumps(entry))
    assert check(root, "--json", root / "r.json") == 1
    text = capsys.readouterr().out
    assert "m_1_10: the near player in 6 and the far player in 2 of 6 frames" in text
    assert text.rstrip().endswith("gaps in 1 of 2 rallies")
    assert json.loads((root / "r.json").read_text())["rallies_with_gaps"] == {
        "m_1_10": {"players": {"near": 6, "far": 2}}
    }


def test_gaps_exit_with_1_and_are_counted_in_the_json_report(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame, flow = root / "vid_frames_224/m_1_10/000002.jpg", root / "tennis_flows/m_20_30/pair_00000.npy"
    frame.write_bytes(frame.read_bytes()[:-40])
    flow.unlink()
    assert check(root, "--json", root / "r.json") == 1
    text = capsys.readouterr().out
    assert "gaps in 2 of 2 rallies" in text
    assert "000002.jpg: truncated JPEG" in text
    report = json.loads((root / "r.json").read_text())
    assert report["modalities"]["flow"]["missing_frames"] == 1
    assert report["modalities"]["rgb"]["unreadable_frames"] == 1
    assert report["annotation_problems"] == []


def test_frames_of_a_wrong_size_are_counted_separately(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_data, "MAX_PROBLEMS_SHOWN", 5)
    image = cv2.imread(str(root / "vid_frames_224/m_1_10/000002.jpg"))
    for k in range(FRAMES):
        cv2.imwrite(str(root / f"vid_frames_224/m_1_10/{k:06d}.jpg"), image[:-2])
    write_flow(root / "tennis_flows/m_20_30/pair_00000.npy", np.zeros((2, 8, 8), np.float32))
    assert check(root, "--json", root / "r.json") == 1
    text = capsys.readouterr().out
    assert "and 1 more message about the first files of each rally; --json FILE writes them" in text
    hint = "set --frame-size to the size of the stored frames, or add dataset=demo for the demo data"
    assert f"the expected size is 16 x 24 px: {hint}" in text
    modalities = json.loads((root / "r.json").read_text())["modalities"]
    assert [modalities[name]["wrong_size_frames"] for name in ("rgb", "flow", "skeleton")] == [FRAMES, 1, 0]
    assert [modalities[name]["unreadable_frames"] for name in ("rgb", "flow", "skeleton")] == [0, 0, 0]


def test_check_without_a_root_states_that_no_file_was_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root / "a.json")]) == 0
    assert "only the annotations were checked; add --root DIR to check the frame" in capsys.readouterr().out


def test_annotation_errors_are_listed_and_can_be_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = to_json(RALLIES)[0]
    entry["events"] = [{"frame": f, "label": LABEL} for f in (5, 3, 3, 99)]
    entry["near_name"], entry["near_hand"] = "Ana B", "LH"
    (tmp_path / "a.json").write_text(json.dumps([entry, {"video": "x"}]))
    clean = tmp_path / "clean.json"
    assert main([str(tmp_path / "a.json"), "--write-clean", str(clean)]) == 1
    text = capsys.readouterr().out
    for expected in ("m_1_10, event 1", "event 2: a duplicate", "event 3: frame=99 is out of range", "x: the key"):
        assert expected in text
    folders = "vid_frames_224 (rgb), tennis_flows (flow), skeletons/f3set-tennis (skeleton)"
    assert f"{clean}: 1 valid rally; the training also needs their files in {folders}" in text
    assert [e.frame for e in load_f3set(clean)[0].events] == [3, 5]
    assert load_f3set(clean)[0].near == Player("Ana B", "LH")


def test_only_rallies_with_all_files_are_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "skeletons/f3set-tennis/m_1_10.pkl"
    entry = pickle.loads(path.read_bytes())
    entry["keypoint_score"][1] = 0  # a file without the far player is still there
    path.write_bytes(pickle.dumps(entry))
    (root / "tennis_flows/m_20_30/pair_00000.npy").unlink()
    clean = root / "clean.json"
    assert check(root, "--write-clean", clean, "--present-only") == 1
    assert f"{clean}: 1 valid rally; 1 without all files excluded" in capsys.readouterr().out
    assert [rally.video for rally in load_f3set(clean)] == ["m_1_10"]
    (root / "tennis_flows/m_1_10/pair_00000.npy").unlink()
    assert check(root, "--write-clean", clean, "--present-only") == 2
    assert "no rally is left; 2 without all files excluded" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(root / "a.json"), "--write-clean", str(clean), "--present-only"])
    assert "--present-only needs --write-clean FILE, and --root DIR" in capsys.readouterr().err


def test_checks_that_cannot_run_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.json")]) == 2
    shown = capsys.readouterr().err
    assert shown == f"mmdistill check-data: error: {tmp_path / 'none.json'}: No such file or directory\n"
    with pytest.raises(SystemExit) as stopped:
        main(["a.json", "b.json"])
    assert stopped.value.code == 2
    assert "give one annotation file at a time, got a.json, b.json" in capsys.readouterr().err


def test_table_is_complete_at_80_columns(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert check(root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["┃", "┃", "rgb", "┃", "flow", "┃", "skeleton", "┃"] for line in lines)
    assert any("rallies longer than annotated │ 0" in line for line in lines)


def test_wrong_root_is_reported_with_the_option(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = str(root / "a.json")
    assert main([annotations, "--root", str(root / "absent")]) == 2
    shown = capsys.readouterr().err
    assert f"--root {root / 'absent'}: there is no such folder" in shown
    assert "target_data_dir" not in shown
    (root / "skeletons").rename(root / "elsewhere")
    assert main([annotations, "--root", str(root)]) == 2
    shown = capsys.readouterr().err
    assert f"--root {root}: it contains no skeletons/f3set-tennis (skeleton); " in shown
    assert shown.endswith("set --skeleton-dir, or check only the others with --modalities rgb flow\n")


def test_folder_is_reported_with_its_annotation_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root)]) == 2
    assert f"{root} is a folder; give an annotation file; it contains {root}/a.json\n" in capsys.readouterr().err


def test_clean_file_names_the_chosen_modalities(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root / "a.json"), "--write-clean", str(root / "c.json"), "--modalities", "rgb"]) == 0
    assert "their files in vid_frames_224 (rgb)\n" in capsys.readouterr().out


def test_annotations_of_a_dataset_without_its_folder_are_checked_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clips = [{"clip_uid": "a", "clip_frame": k, "num_frames": 40, "action_idx": k % 2} for k in (4, 9, 90)]
    Path("clips.json").write_text(json.dumps({"clips": clips}))
    assert main(["dataset=meccano", "clips.json", "--write-clean", "clean.json"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("clips.json: 1 rally, 2 events, 2 labels\n  a: frame 89 is out of range")
    assert "only the annotations were checked; there is no data/MECCANO; add --root DIR" in shown.out
    assert not shown.err
    assert Path("clean.json").exists()
    assert main(["dataset=meccano", "data_module.target_data_dir=absent", "clips.json"]) == 2
    assert "absent/RGB_frames does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("num_valid", "status"), [(0, 2), (1, 1)])
def test_all_problems_are_in_the_json_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_valid: int, status: int
) -> None:
    """Also if no rally is valid, which is an error without advice to write the valid ones."""
    path, report = tmp_path / "a.json", tmp_path / "r.json"
    rallies = [{"video": f"v{k}", "num_frames": int(k < num_valid), "fps": 25, "events": []} for k in range(10)]
    path.write_text(json.dumps(rallies))
    assert main([str(path), "--json", str(report), "--write-clean", str(tmp_path / "clean.json")]) == status
    shown = capsys.readouterr()
    assert len(json.loads(report.read_text())["annotation_problems"]) == 10 - num_valid
    if num_valid:
        assert "and 1 more problem; --json FILE writes all\n" in shown.out
    else:
        assert f"error: {path}: 10 problems:\n  v0: num_frames=0 is not a count of frames" in shown.err
        assert "--write-clean" not in shown.err
