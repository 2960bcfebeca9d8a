"""Skeletons: persons, scores, the file cache, and invalid files."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.skeleton import ExtraKeypointReader, SkeletonReader
from mmdistill.data.readers.skeleton_format import JOINT_LAYOUTS, SkeletonFormat
from tests.contracts.reader_contract import ReaderContract
from tests.synthetic_dots import DotVideo, write_dot_video

SIZE = (64, 96)
WORLD = Path(__file__).resolve().parents[5] / "shared" / "data" / "world" / "skeletons"


class TestSkeletonReaderContract(ReaderContract):
    frame_shape = (2, 17, 3)
    dtype = "float32"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_dot_video(root, video=video, frames=num_frames)

    def open_reader(self, root: Path) -> Reader:
        return SkeletonReader(root / "skeleton", frame_size=SIZE)


def _skeleton(frames: int = 6, persons: int | None = 2) -> dict[str, object]:
    shape = (frames, 17) if persons is None else (persons, frames, 17)
    return {
        "keypoint": np.full((*shape, 2), 10.0),
        "keypoint_score": np.ones(shape),
        "total_frames": frames,
        "img_shape": (128, 192),
    }


def test_missing_row_and_file_raise(dot: DotVideo) -> None:
    with pytest.raises(FrameError, match=r"no row for frame 24, the file has 24 rows"):
        dot.readers()["skeleton"].read("dot", [24])
    with pytest.raises(FrameError, match=r"none.pkl: no such skeleton file"):
        dot.readers()["skeleton"].read("none", [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keypoint": None}, "the key 'keypoint' is missing; the file has img_shape"),
        (
            {"keypoint": np.full((2, 6, 17, 3), 5.0)},
            r"triples .* besides keypoint_score; remove the key keypoint_score",
        ),
        ({"keypoint": np.full((2, 6, 17, 4), 5.0)}, r"shape \(2, 6, 17, 4\), expected"),
        ({"annotations": []}, "skeletons of several videos; `mmdistill convert-skeletons`"),
        ({"total_frames": 9}, "total_frames=9, but keypoint has 6 rows"),
        (
            {"keypoint": np.full((6, 2, 17, 2), 5.0), "keypoint_score": np.ones((6, 2, 17))},
            r"but keypoint has 2 rows: its shape is \(6, 2, 17\), expected \(persons, frames, joints\)",
        ),
        ({"keypoint": np.zeros((2, 6, 18, 2))}, r"shape \(2, 6, 18, 2\)"),
        ({"keypoint_score": np.zeros((2, 5, 17))}, r"keypoint_score has shape \(2, 5, 17\)"),
        ({"keypoint": "text"}, "are not numbers"),
        ({"img_shape": "64x68"}, "img_shape='64x68' is text, expected \\(height, width\\)"),
        ({"img_shape": (0, 5)}, "expected \\(height, width\\)"),
        ({"keypoint_score": -np.ones((2, 6, 17))}, "negative"),
        (
            {"keypoint_score": np.full((2, 6, 17), 7.5)},
            "values up to 7.5, expected 0 to 1; set data_module.skeleton_sc",
        ),
        ({"keypoint_score": np.full((2, 6, 17), 93.0)}, "values up to 93, .* 100 for percentages"),
        (
            {"keypoint": np.random.default_rng(0).uniform(-0.1, 1.1, (2, 6, 17, 2))},
            "keypoint has values from 0 to 1, but must be in px: multiply by the image's width and height",
        ),
        (
            {"keypoint": np.random.default_rng(0).uniform(-1, 1, (2, 6, 17, 2))},
            r"values from -1 to 1, but must be in px: replace x by \(x \+ 1\) / 2 \* width and y by",
        ),
        (
            {"keypoint": np.stack([np.full((6, 17, 2), 50.0), np.random.default_rng(0).uniform(0, 1, (6, 17, 2))])},
            "keypoint of person 1 has values from 0 to 1, but must be in px",
        ),
        (
            {"keypoint": np.full((2, 6, 17, 2), 500.0)},
            "100.0 % of the joints with a score lie outside the image of 128",
        ),
    ],
)
def test_error_names_the_invalid_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    entry = {k: v for k, v in {**_skeleton(), **change}.items() if v is not None}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    with pytest.raises(FrameError, match=message):
        SkeletonReader(tmp_path, frame_size=(64, 96)).read("v", [0])


def _write(path: Path, **changes: object) -> SkeletonReader:
    """A reader of a file with these values. A key with the value None is removed from the file."""
    entry = {key: value for key, value in {**_skeleton(), **changes}.items() if value is not None}
    (path / "v.pkl").write_bytes(pickle.dumps(entry))
    return SkeletonReader(path, frame_size=(128, 192))


def _random_joints(num_joints: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates within 128 x 192 px and scores of 2 persons in 6 frames."""
    rng = np.random.default_rng(0)
    return rng.uniform(5, 120, (2, 6, num_joints, 2)), rng.uniform(0.5, 1, (2, 6, num_joints))


def test_optional_keys_and_other_containers_give_the_same_rows(tmp_path: Path) -> None:
    joints, scores = _random_joints()
    expected = _write(tmp_path, keypoint=joints, keypoint_score=scores).read("v", range(6))
    triples = np.concatenate([joints, scores[..., None]], axis=3)
    for changes in (
        {"keypoint": triples, "keypoint_score": None},
        {"keypoint": joints, "keypoint_score": scores, "img_shape": None},
        {"keypoint": joints, "keypoint_score": scores, "img_shape": [128, 192, 3], "total_frames": None},
    ):
        np.testing.assert_array_equal(_write(tmp_path, **changes).read("v", range(6)), expected)
    (tmp_path / "v.pkl").write_bytes(pickle.dumps([{**_skeleton(), "keypoint": joints, "keypoint_score": scores}]))
    np.testing.assert_array_equal(SkeletonReader(tmp_path, frame_size=(128, 192)).read("v", range(6)), expected)
    (tmp_path / "v.pkl").write_bytes(pickle.dumps([_skeleton(), _skeleton()]))
    with pytest.raises(FrameError, match="mmdistill convert-skeletons"):
        SkeletonReader(tmp_path, frame_size=(128, 192)).read("v", [0])


@pytest.mark.usefixtures("new_command")
def test_missing_scores_and_image_size_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    joints, _ = _random_joints()
    joints[1, 3, 5] = np.nan
    joints[0, 2, 4] = 0
    reader = _write(tmp_path, keypoint=joints, keypoint_score=None, img_shape=None)
    rows = reader.read("v", range(6))
    assert rows[..., 2].sum() == 2 * 6 * 17 - 2
    assert not rows[3, 1, 5].any()
    assert not rows[2, 0, 4].any()
    for cached in (False, True):
        SkeletonReader(tmp_path, frame_size=(128, 192), cache_bytes=int(cached)).read("v", [0])
    assert [record.message for record in caplog.records] == [
        "skeleton files without img_shape: their image is 128 x 192 px, from data_module.frame_size",
        "skeleton files without keypoint_score: joints with finite coordinates other than (0, 0) have score 1",
    ]


def test_file_format_gives_image_size_and_largest_score(tmp_path: Path) -> None:
    joints, scores = _random_joints()
    expected = _write(tmp_path, keypoint=joints, keypoint_score=scores).read("v", range(6))
    _write(tmp_path, keypoint=2 * (joints + 0.5) - 0.5, keypoint_score=100 * scores, img_shape=None)
    file_format = SkeletonFormat(img_shape=(256, 384), score_max=100)
    rows = SkeletonReader(tmp_path, frame_size=(128, 192), file_format=file_format).read("v", range(6))
    np.testing.assert_allclose(rows, expected, rtol=1e-5)


@pytest.mark.parametrize("layout", JOINT_LAYOUTS)
def test_joints_of_other_layouts_are_selected(tmp_path: Path, layout: str) -> None:
    size, positions = JOINT_LAYOUTS[layout]
    joints, scores = _random_joints(size)
    _write(tmp_path, keypoint=joints, keypoint_score=scores)
    for file_format in (SkeletonFormat(layout), SkeletonFormat(list(positions))):
        rows = SkeletonReader(tmp_path, frame_size=(128, 192), file_format=file_format).read("v", [4])
        np.testing.assert_allclose(rows[0, :, :, 0], joints[:, 4, positions, 0], rtol=1e-5)
        np.testing.assert_allclose(rows[0, :, :, 2], scores[:, 4, positions], rtol=1e-5)


def test_joints_outside_the_image_are_logged_once_per_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At most 1 % of the joints outside is a person at the border of the image, which is not logged."""
    joints, scores = _random_joints()
    joints[0, 0, :2, 0] = 400  # 2 of 204
    _write(tmp_path, keypoint=joints, keypoint_score=scores).read("v", [0])
    assert not caplog.records
    joints[0, :3, :, 0] = 400
    for _ in range(2):  # as the training and the evaluation
        reader = _write(tmp_path, keypoint=joints, keypoint_score=scores)
        (tmp_path / "w.pkl").write_bytes((tmp_path / "v.pkl").read_bytes())
        reader.read("v", [0])
        reader.read("w", [0])
    (record,) = caplog.records
    assert "v.pkl: 25.0 % of the joints with a score lie outside the image of 128 x 192 px" in record.message


@pytest.mark.skipif(not WORLD.exists(), reason="the corpus of real files is not next to this repository")
@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("no_score", ""),
        ("no_img_shape", ""),
        ("xy_score_triples", ""),
        ("python2", ""),
        ("mmaction2_dict_in_list", ""),
        ("openpose_25_joints", "set it to openpose25"),
        ("scores_to_8", "keypoint_score has values up to 7.998"),
    ],
)
def test_files_of_other_sources_equal_the_control(folder: str, message: str) -> None:
    def read(name: str, file_format: SkeletonFormat | None = None) -> np.ndarray:
        return SkeletonReader(WORLD / name, frame_size=(64, 68), file_format=file_format).read("rally_0_40", range(40))

    expected = read("control")
    if message:
        with pytest.raises(FrameError, match=message):
            read(folder)
        assert read("openpose_25_joints", SkeletonFormat("openpose25")).shape == expected.shape
        np.testing.assert_allclose(read("scores_to_8", SkeletonFormat(score_max=8)), expected, rtol=1e-6)
        return
    rows = read(folder)
    if folder == "no_score":
        assert (rows[..., 2] == 1).all()
        rows[..., 2] = expected[..., 2]
    np.testing.assert_array_equal(rows, expected)


def test_nan_joint_is_absent_without_a_score_and_raises_with_one(tmp_path: Path) -> None:
    entry = _skeleton()
    entry["keypoint"][1, 3, 5] = np.nan  # type: ignore[index]
    entry["keypoint_score"][1, 3, 5] = 0  # type: ignore[index]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    array = SkeletonReader(tmp_path, frame_size=(64, 96)).read("v", range(6))
    assert not array[3, 1, 5].any()
    entry["keypoint_score"][1, 3, 5] = 0.5  # type: ignore[index]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    reader = SkeletonReader(tmp_path, frame_size=(64, 96))
    reader.read("v", [0, 1, 2])
    with pytest.raises(FrameError, match="keypoint_score is not finite at frame 3, person 1, joint 5"):
        reader.read("v", [2, 3])


@pytest.mark.parametrize("persons", [None, 1, 2, 4])
def test_number_of_persons_is_constant(tmp_path: Path, persons: int | None) -> None:
    entry = _skeleton(persons=persons)
    if persons == 4:
        entry["keypoint"] = np.arange(4.0)[:, None, None, None] * np.ones((4, 6, 17, 2))
        entry["keypoint_score"] = np.array([0.1, 0.9, 0.2, 0.8])[:, None, None] * np.ones((4, 6, 17))
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    array = SkeletonReader(tmp_path, frame_size=(128, 192)).read("v", [0])
    assert array.shape == (1, 2, 17, 3)
    if persons == 4:
        np.testing.assert_allclose(array[0, :, 0, 2], [0.9, 0.8])
        np.testing.assert_allclose(array[0, :, 0, 0], [1, 3], atol=1e-5)


def test_file_is_unpickled_once_within_the_cache_size(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(_skeleton()))
    file_bytes = 6 * 2 * 17 * 3 * 4
    reader = SkeletonReader(tmp_path, frame_size=(64, 96), cache_bytes=2 * file_bytes)
    for name in "aabbaab":
        reader.read(name, [0])
    assert reader.files_read == 2
    for name in "cacb":  # c evicts a, the least recently used; then a evicts b
        reader.read(name, [0])
    assert reader.files_read == 5
    assert reader._cached_bytes <= 2 * file_bytes


class TestReaderWithExtraKeypointsContract(ReaderContract):
    frame_shape = (2, 19, 3)
    dtype = "float32"

    def write_video(self, root: Path, video: str, num_frames: int) -> None:
        write_dot_video(root, video=video, frames=num_frames)
        path = root / "extra" / f"{video}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.ones((num_frames, 2, 3)) * np.arange(1, num_frames + 1)[:, None, None] / num_frames)

    def open_reader(self, root: Path) -> Reader:
        file_format = SkeletonFormat(None, (1, 1), 1.0, 2)  # an image of 1 px: coordinates from 0 to 1 are px
        extra = ExtraKeypointReader(
            root / "extra", frame_size=SIZE, max_persons=1, pattern="{video}.npy", file_format=file_format
        )
        return SkeletonReader(root / "skeleton", frame_size=SIZE, extra=extra)


def _extra(root: Path, *, img_shape: tuple[int, int] | None = None, pattern: str = "{video}.npy") -> SkeletonReader:
    key = "data_module.modalities.skeleton.extra_keypoints."
    file_format = SkeletonFormat(None, img_shape, 1.0, 3, key)
    extra = ExtraKeypointReader(root, frame_size=SIZE, max_persons=1, pattern=pattern, file_format=file_format)
    return SkeletonReader(root, frame_size=SIZE, extra=extra)


@pytest.mark.parametrize("suffix", ["npy", "pkl", "dict"])
def test_extra_keypoints_follow_the_joints_of_the_first_person(tmp_path: Path, suffix: str) -> None:
    """Coordinates of an image of 640 x 960 px: x = (x' + 0.5) / 10 - 0.5 in the stored frame."""
    points = np.random.default_rng(0).uniform(0, 600, (6, 3, 3))
    points[..., 2] = np.random.default_rng(1).uniform(0, 1, (6, 3))
    points[2, 1] = np.nan, np.nan, 0  # not found
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(_skeleton()))
    entry = {"keypoint": points[..., :2], "keypoint_score": points[..., 2], "img_shape": (640, 960)}
    if suffix == "npy":
        np.save(tmp_path / "v.npy", points)
    else:
        (tmp_path / "v.npy.pkl").write_bytes(pickle.dumps(points if suffix == "pkl" else entry))
    pattern = "{video}.npy" if suffix == "npy" else "{video}.npy.pkl"
    reader = _extra(tmp_path, img_shape=None if suffix == "dict" else (640, 960), pattern=pattern)
    found = reader.read("v", [4, 2])
    expected = np.concatenate(((points[[4, 2], :, :2] + 0.5) / 10 - 0.5, points[[4, 2], :, 2:]), axis=2)
    expected[1, 1] = 0
    np.testing.assert_allclose(found[:, 0, 17:], expected, rtol=1e-6)
    assert not found[:, 1, 17:].any()
    np.testing.assert_array_equal(found[:, :, :17], SkeletonReader(tmp_path, frame_size=SIZE).read("v", [4, 2]))
    assert reader.load_video("v").shape == (6, 2, 17, 3)
    assert reader.settings != SkeletonReader(tmp_path, frame_size=SIZE).settings


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.full((6, 2, 3), 5.0), "2 keypoints, but the config names 3; correct joints or extra_keypoints.names"),
        (np.full((6, 3, 4), 5.0), r"shape \(1, 6, 3, 4\), expected"),
        (np.full((2, 6, 3, 3), 1.0), "2 persons, expected one: an array"),
        (np.full((4, 3, 3), 1.0), "no row for frame 5, the file has 4 rows"),
        (np.full((6, 3, 3), 500.0) * (1, 1, 0.001), r"correct img_shape, or .*skeleton\.extra_keypoints\.img_shape if"),
        (np.full((6, 3, 3), 7.0), r"set data_module\.modalities\.skeleton\.extra_keypoints\.score_max to the largest"),
        (np.full((6, 3, 3), np.nan), "not finite at frame 5, .* write score 0 for a joint that was not found"),
        (np.random.default_rng(0).uniform(0, 1, (6, 3, 3)), "values from 0 to 1, but must be in px"),
        (np.full((6, 3, 3), "a"), "not a .npy file of numbers"),
        (None, "v.npy: no such extra keypoint file"),
    ],
)
def test_invalid_extra_keypoints_raise_an_error_that_names_the_file(
    tmp_path: Path, points: np.ndarray | None, message: str
) -> None:
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(_skeleton()))
    if points is not None:
        np.save(tmp_path / "v.npy", points)
    with pytest.raises(FrameError, match=message) as caught:
        _extra(tmp_path).read("v", [5])
    assert str(caught.value).startswith(f"{tmp_path}/v.npy: ")


def test_hostile_extra_keypoints_run_nothing(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "was_run"),)

    (tmp_path / "v.pkl").write_bytes(pickle.dumps(_skeleton()))
    (tmp_path / "v.points.pkl").write_bytes(pickle.dumps(Hostile()))
    np.save(tmp_path / "v.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    for pattern in ("{video}.points.pkl", "{video}.npy"):
        with pytest.raises(FrameError, match=r"rejected because|not a \.npy file of numbers"):
            _extra(tmp_path, pattern=pattern).read("v", [0])
    assert not (tmp_path / "was_run").exists()
