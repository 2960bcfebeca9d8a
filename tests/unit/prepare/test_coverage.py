"""The coverage check counts exactly the files that are missing, unreadable or too many."""

import os
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.base import Event, Rally
from mmdistill.data.readers.base import Reader
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import pack_flow, write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import ExtraKeypointReader, SkeletonReader
from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.data.readers.zip_file import write_zip
from mmdistill.prepare.coverage import check_all

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
            image = np.full((*SIZE, 3), 20 * k, np.uint8)
            cv2.imwrite(str(tmp_path / f"vid_frames_224/{rally.video}/{k:06d}.jpg"), image)
            if k < FRAMES - 1:
                flow = np.zeros((2, *SIZE), np.float32)
                write_flow(tmp_path / f"tennis_flows/{rally.video}/pair_{k:05d}.npy", flow)
        write_skeleton(tmp_path, rally.video)
    return tmp_path


def spread_joints(frames: int) -> np.ndarray:
    """Joints (2, frames, 17, 2) of two persons of 33 px height in px of an image of 160 x 240 px."""
    return (
        np.linspace((10, 20), (30, 53), 17) + np.array([[100, 100], [0, 0]])[:, None, None] + np.zeros((frames, 1, 2))
    )


def write_skeleton(root: Path, video: str, *, frames: int = FRAMES, has_nan: bool = False) -> None:
    scores = np.ones((2, frames, 17))
    scores[1, : frames // 2] = 0
    entry = {
        "keypoint": spread_joints(frames),
        "keypoint_score": scores,
        "total_frames": frames,
        "img_shape": (160, 240),
    }
    if has_nan:
        entry["keypoint"][0, 4] = np.nan  # type: ignore[index]
    (root / f"skeletons/f3set-tennis/{video}.pkl").write_bytes(pickle.dumps(entry))


def test_joints_outside_the_image_are_reported(root: Path) -> None:
    path = root / "skeletons/f3set-tennis/m_1_10.pkl"
    entry = pickle.loads(path.read_bytes())
    entry["keypoint"][1, :, 0] += 500  # 1 of 17 joints of a person at the border
    path.write_bytes(pickle.dumps(entry))
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["complete"]
    assert report["messages"] == [f"{path}: 2.0 % of the joints with a score lie outside the image"]
    entry["keypoint"][1, :, 1:] += 500
    path.write_bytes(pickle.dumps(entry))
    assert not check_all(RALLIES, open_readers(root), workers=1)["complete"]
    entry["keypoint"][0] += 500
    path.write_bytes(pickle.dumps(entry))
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert not report["complete"]
    assert report["messages"][0].startswith(
        f"{path}: 100.0 % of the joints with a score lie outside the image of 160 x"
    )


def open_readers(root: Path) -> dict[str, Reader]:
    return {
        "rgb": RgbReader(root / "vid_frames_224", frame_size=SIZE),
        "flow": FlowReader(root / "tennis_flows", frame_size=SIZE),
        "skeleton": SkeletonReader(root / "skeletons/f3set-tennis", frame_size=SIZE),
    }


def test_complete_data_is_reported_as_complete(root: Path) -> None:
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["complete"]
    assert report["modalities"]["rgb"]["expected_frames"] == 20
    assert report["modalities"]["flow"]["expected_frames"] == 18
    assert report["players"] == {
        "near": {"found_frames": 20, "expected_frames": 20, "share": 1.0},
        "far": {"found_frames": 10, "expected_frames": 20, "share": 0.5},
    }


def write_keypoints(root: Path, joints: np.ndarray, **changes: object) -> Path:
    path = root / "skeletons/f3set-tennis/m_1_10.pkl"
    path.write_bytes(pickle.dumps({**pickle.loads(path.read_bytes()), "keypoint": joints, **changes}))
    return path


def test_wrong_image_size_is_a_gap_with_the_occupied_share(root: Path) -> None:
    """The joints are in px of an image of 160 x 240, but the file states 6400 x 9000."""
    path = write_keypoints(root, spread_joints(FRAMES), img_shape=(6400, 9000))
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert not report["complete"]
    assert report["rallies_with_gaps"]["m_1_10"]["skeleton"]["wrong_scale"]
    assert report["messages"] == [
        f"{path}: all joints lie within 2.1 % of the height and 1.3 % of the width of the image in all frames; correct "
        "img_shape, or the scale of keypoint"
    ]


def test_one_person_in_another_scale_is_reported(root: Path) -> None:
    joints = spread_joints(FRAMES)
    joints[1] /= 20
    path = write_keypoints(root, joints)
    (message,) = check_all(RALLIES, open_readers(root), workers=1)["messages"]
    assert message.startswith(f"{path}: the joints of person 1 lie within 1.0 % of the height and 0.4 % of the width")
    for changed, name in ((joints / 100, "keypoint"), (np.stack([joints[0], joints[1] / 4]), "keypoint of person 1")):
        write_keypoints(root, changed)
        report = check_all(RALLIES, open_readers(root), workers=1)
        assert not report["complete"]
        (message,) = report["messages"]
        assert message.startswith(f"{path}: {name} has values from 0 to 1")


def test_person_outside_the_image_is_a_gap(root: Path) -> None:
    joints = spread_joints(FRAMES)
    joints[1, :, :3] += 1000  # 3 of 17 joints of one person, which are 12 % of all found ones
    path = write_keypoints(root, joints)
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["rallies_with_gaps"]["m_1_10"]["skeleton"]["wrong_scale"]
    assert f"{path}: 17.6 % of the joints of person 1 lie outside the image; correct img_shape" in report["messages"][1]


def test_frames_in_another_scale_are_a_gap(root: Path) -> None:
    joints = spread_joints(FRAMES)
    joints[0, 6:] /= 100
    path = write_keypoints(root, joints)
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["rallies_with_gaps"]["m_1_10"]["skeleton"]["wrong_scale"]
    (message,) = report["messages"]
    assert message.startswith(f"{path}: 4 skeletons smaller than 2% of the image")


@pytest.mark.parametrize("num_persons", [1, 2])
def test_far_player_who_stands_still_has_a_plausible_scale(root: Path, num_persons: int) -> None:
    """A player of 80 px in an image of 1080 lines; the joints occupy 70 px."""
    player = np.linspace((900, 300), (920, 370), 17) + np.zeros((num_persons, FRAMES, 1, 2))
    write_keypoints(root, player, keypoint_score=np.ones((num_persons, FRAMES, 17)), img_shape=(1080, 1920))
    readers = {"skeleton": SkeletonReader(root / "skeletons/f3set-tennis", frame_size=SIZE, max_persons=num_persons)}
    report = check_all(RALLIES[:1], readers, workers=1)
    assert report["complete"]
    assert not report["messages"]


def test_persons_that_are_not_used_are_counted(root: Path) -> None:
    joints = np.concatenate([spread_joints(FRAMES), spread_joints(FRAMES)[:1] + 20])
    path = write_keypoints(root, joints, keypoint_score=np.ones((3, FRAMES, 17)))
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["complete"]
    assert report["messages"] == [f"{path}: 3 persons, 2 used"]


def test_unread_skeleton_file_has_one_message_and_no_players(root: Path) -> None:
    path = write_keypoints(root, spread_joints(FRAMES), total_frames=3)
    (root / "skeletons/f3set-tennis/m_20_30.pkl").unlink()
    report = check_all(RALLIES, open_readers(root), workers=1)
    first, second = report["messages"]
    assert first.startswith(f"{path}: total_frames=3, but keypoint has 10 rows")
    assert second.startswith("missing skeleton files: ")
    assert report["players"] == {}
    assert "players" not in report["rallies_with_gaps"]["m_1_10"]


def damage_files(root: Path) -> None:
    frames, flows = root / "vid_frames_224/m_1_10", root / "tennis_flows/m_20_30"
    (frames / "000002.jpg").unlink()
    (frames / "000003.jpg").write_bytes((frames / "000003.jpg").read_bytes()[:-40])
    cv2.imwrite(str(frames / "000004.jpg"), np.zeros((8, 8, 3), np.uint8))
    (flows / "pair_00000.npy").unlink()
    np.save(flows / "pair_00001.npy", np.zeros((2, 3, 4), np.float32))
    (root / "vid_frames_224/m_20_30/000010.jpg").write_bytes(b"")
    write_skeleton(root, "m_1_10", has_nan=True)
    (root / "skeletons/f3set-tennis/m_20_30.pkl").unlink()


def gap(*, missing: int = 0, unreadable: int = 0, wrong_size: int = 0, longer: bool = False) -> dict[str, int]:
    counts = {"missing_frames": missing, "unreadable_frames": unreadable, "wrong_size_frames": wrong_size}
    return {**counts, "longer_than_annotated": longer}


def test_every_kind_of_gap_is_counted_and_named(root: Path) -> None:
    damage_files(root)
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert not report["complete"]
    gaps = report["rallies_with_gaps"]
    assert gaps["m_1_10"]["rgb"] == gap(missing=1, unreadable=1, wrong_size=1)
    assert gaps["m_1_10"]["skeleton"] == gap(unreadable=1)
    assert gaps["m_20_30"]["rgb"] == gap(longer=True)
    assert gaps["m_20_30"]["flow"] == gap(missing=1, wrong_size=1)
    assert gaps["m_20_30"]["skeleton"]["missing_frames"] == 10
    assert report["modalities"]["skeleton"]["rallies_without_files"] == 1
    text = "\n".join(report["messages"])
    for part in ("000003.jpg: truncated JPEG", "000004.jpg: 8 x 8 px", "pair_00001.npy: shape (2, 3, 4)", "frame 4"):
        assert part in text
    flow, skeleton = root / "tennis_flows/m_20_30/pair_00000.npy", root / "skeletons/f3set-tennis/m_20_30.pkl"
    assert f"missing flow files: {flow}" in report["messages"]
    assert f"missing skeleton files: {skeleton}" in report["messages"]


def test_first_missing_files_are_named(root: Path) -> None:
    folder = root / "tennis_flows/m_20_30"
    for k in range(5):
        (folder / f"pair_{k:05d}.npy").unlink()
    (message,) = check_all(RALLIES, open_readers(root), workers=1)["messages"]
    named = ", ".join(str(folder / f"pair_{k:05d}.npy") for k in range(3))
    assert message == f"missing flow files: {named} and 2 more"


def test_skeleton_file_of_another_length_is_reported(root: Path) -> None:
    write_skeleton(root, "m_1_10", frames=8)
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["rallies_with_gaps"]["m_1_10"]["skeleton"]["missing_frames"] == 2
    assert "8 rows, but the annotation has 10 frames" in report["messages"][0]


def test_frames_after_the_last_annotated_frame_are_reported(root: Path) -> None:
    write_skeleton(root, "m_1_10", frames=FRAMES + 2)
    (root / "vid_frames_224/m_20_30/000010.jpg").write_bytes(b"")
    report = check_all(RALLIES, open_readers(root), workers=1)
    assert report["modalities"]["skeleton"]["rallies_longer_than_annotated"] == 1
    assert report["modalities"]["rgb"]["rallies_longer_than_annotated"] == 1
    assert report["rallies_with_gaps"]["m_1_10"]["skeleton"]["longer_than_annotated"]
    assert "m_20_30: rgb has a file after frame 9, the last annotated frame" in report["messages"]


def test_packed_files_are_checked_and_a_truncated_one_is_named(root: Path) -> None:
    for rally in RALLIES:
        frames, flows = root / "vid_frames_224" / rally.video, root / "tennis_flows" / rally.video
        images, pairs = sorted(frames.iterdir()), sorted(flows.iterdir())
        write_zip(frames / "frames.zip", images[: 8 if rally is RALLIES[0] else None])
        pack_flow(flows / "flow.npy", pairs)
        for file in (*images, *pairs):
            file.unlink()
    readers = open_readers(root)
    report = check_all(RALLIES, readers, workers=1)
    assert report["rallies_with_gaps"] == {"m_1_10": {"rgb": gap(missing=2)}}
    archive, packed = root / "vid_frames_224/m_20_30/frames.zip", root / "tennis_flows/m_20_30/flow.npy"
    for path in (archive, packed):
        path.write_bytes(path.read_bytes()[:-9])
    report = check_all(RALLIES, readers, workers=1)
    assert report["rallies_with_gaps"]["m_20_30"] == {"rgb": gap(unreadable=10), "flow": gap(unreadable=9)}
    assert [m.split("; ")[0] for m in report["messages"][1:]] == [
        f"{archive}: truncated, or not a zip archive",
        f"{packed}: truncated, or not a .npy file of numbers",
    ]


def test_each_folder_is_listed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing is a call of scandir or listdir; a stat per file would be slow on network file systems."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, **kw: (calls.append(f"{name} {path}"), original(path, **kw))[1])

    for name in ("listdir", "scandir", "stat"):
        watch(name)
    readers = {name: reader for name, reader in open_readers(root).items() if name != "skeleton"}
    assert check_all(RALLIES, readers, workers=1, every=100)["complete"]
    folders = [root / kind / rally.video for rally in RALLIES for kind in ("vid_frames_224", "tennis_flows")]
    assert sorted(c for c in calls if not c.startswith("stat")) == sorted(f"listdir {folder}" for folder in folders)
    assert len(calls) <= 4 * len(folders)


def test_opening_every_third_file_still_counts_all_missing_files(root: Path) -> None:
    damage_files(root)
    report = check_all(RALLIES, open_readers(root), workers=1, every=3)
    assert report["rallies_with_gaps"]["m_1_10"]["rgb"]["missing_frames"] == 1
    assert report["rallies_with_gaps"]["m_1_10"]["rgb"]["unreadable_frames"] == 1  # 000003.jpg, not 000004.jpg


def test_extra_keypoints_are_checked_and_are_no_players(root: Path) -> None:
    """A keypoint of each frame is the ball. It does not count as a joint of the near player."""

    def report(points: np.ndarray) -> dict[str, object]:
        for rally in RALLIES:
            np.save(root / f"{rally.video}.npy", points)
        extra = ExtraKeypointReader(
            root, frame_size=SIZE, max_persons=1, pattern="{video}.npy", file_format=SkeletonFormat(None, num_joints=1)
        )
        readers = {"skeleton": SkeletonReader(root / "skeletons/f3set-tennis", frame_size=SIZE, extra=extra)}
        return check_all(RALLIES[:1], readers, workers=1)

    points = np.tile([4.0, 9.5, 1.0], (FRAMES, 1, 1))
    found = report(points)
    assert found["complete"]
    assert found["players"] == {
        "near": {"found_frames": 10, "expected_frames": 10, "share": 1.0},
        "far": {"found_frames": 5, "expected_frames": 10, "share": 0.5},
    }
    found = report(points[:-3])
    path = f"{root}/m_1_10.npy"
    assert found["messages"] == [f"{path}: 7 rows, but the annotation has 10 frames"]
    assert found["rallies_with_gaps"]["m_1_10"]["skeleton"]["missing_frames"] == 3  # type: ignore[index]
    points[4] = np.nan
    found = report(points)
    assert found["messages"][0].startswith(f"{path}: keypoint or keypoint_score is not finite at frame 4")  # type: ignore[index]
    assert found["rallies_with_gaps"]["m_1_10"]["skeleton"]["unreadable_frames"] == 1  # type: ignore[index]
    (root / "m_1_10.npy").unlink()
    extra = ExtraKeypointReader(root, frame_size=SIZE, max_persons=1, pattern="{video}.npy")
    readers = {"skeleton": SkeletonReader(root / "skeletons/f3set-tennis", frame_size=SIZE, extra=extra)}
    (message,) = check_all(RALLIES[:1], readers, workers=1)["messages"]
    assert message == f"missing skeleton files: {path}"
