"""Readers: the right frame and unit, and no damaged file that looks like a good one."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.readers.base import FrameError
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import FLOW_DTYPES, read_flow, write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from tests.synthetic_dots import LEFT_WRIST, DotWorld


def test_frame_k_flow_k_and_joint_k_show_the_same_place(dot: DotWorld) -> None:
    frames = [20, 3, 4, 22]
    got = {name: reader.read("dot", frames) for name, reader in dot.readers().items()}
    assert (got["rgb"].dtype, got["rgb"].shape) == (np.uint8, (4, 64, 96, 3))
    assert (got["flow"].dtype, got["flow"].shape) == (np.float16, (4, 2, 64, 96))
    assert (got["skeleton"].dtype, got["skeleton"].shape) == (np.float32, (4, 2, 17, 3))
    for position, k in enumerate(frames):
        x, y = dot.places[k]
        red = got["rgb"][position, ..., 0].astype(int) - got["rgb"][position, ..., 2]  # RGB, not BGR
        assert red[y, x] > 150
        ys, xs = np.nonzero(red > 100)
        assert (xs.mean(), ys.mean()) == pytest.approx((x, y))
        assert tuple(got["flow"][position, :, y, x]) == tuple(dot.places[k + 1] - dot.places[k])
        np.testing.assert_allclose(got["skeleton"][position, 0, LEFT_WRIST], [x, y, 1], atol=1e-4)
        assert not got["skeleton"][position, 1].any()


@pytest.mark.parametrize("pattern", ["{vid}/{frame}.jpg", "{video}/frame.jpg", "{frame:06d}.jpg", "{video}/{}.jpg"])
def test_a_pattern_that_does_not_tell_frames_apart_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"must contain \{video\} and \{frame\}, like"):
        RgbReader("frames", frame_size=(8, 8), pattern=pattern)


def _cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize(("keep", "named"), [(0, "empty file"), (0.5, "truncated JPEG"), (0.99, "truncated JPEG")])
def test_damaged_jpegs_are_errors(dot: DotWorld, keep: float, named: str) -> None:
    path = dot.root / "frames/dot/000002.jpg"
    _cut(path, keep)
    with pytest.raises(FrameError, match=named) as caught:
        dot.readers()["rgb"].read("dot", [1, 2, 3])
    assert str(path) in str(caught.value)


def test_wrong_sizes_and_missing_files_are_errors(dot: DotWorld) -> None:
    reader = RgbReader(dot.root / "frames", frame_size=(64, 98))
    with pytest.raises(FrameError, match=r"64 x 96 px, but data_module.frame_size says 64 x 98"):
        reader.read("dot", [0])
    with pytest.raises(FrameError, match=r"000099.jpg: no such rgb file"):
        dot.readers()["rgb"].read("dot", [99])
    with pytest.raises(FrameError, match=r"pair_00023.npy: no such flow file"):
        dot.readers()["flow"].read("dot", [23])
    with pytest.raises(FrameError, match=r"no row for frame 24, it has 24 rows"):
        dot.readers()["skeleton"].read("dot", [24])
    with pytest.raises(FrameError, match=r"none.pkl: no such skeleton file"):
        dot.readers()["skeleton"].read("none", [0])
    with pytest.raises(FrameError, match=r"shape \(2, 64, 96\)"):
        FlowReader(dot.root / "flow", frame_size=(96, 64)).read("dot", [0])


def test_other_file_name_patterns_and_first_numbers(dot: DotWorld) -> None:
    folder = dot.root / "frames/P01_01"
    folder.mkdir()
    for k in range(4):
        (dot.root / f"frames/dot/{k:06d}.jpg").rename(folder / f"frame_{k + 1:010d}.jpg")
    reader = RgbReader(
        dot.root / "frames", frame_size=dot.size, pattern="{video}/frame_{frame:010d}.jpg", frame_number_offset=1
    )
    x, y = dot.places[2]
    assert reader.read("P01_01", [2])[0, y, x, 0] > 150
    assert reader.missing_frames("P01_01", [0, 3, 4]) == [4]
    assert reader.missing_frames("nowhere", [0, 1]) == [0, 1]


@pytest.mark.parametrize("dtype", FLOW_DTYPES)
@pytest.mark.parametrize("largest", [0.0, 0.3, 60.0])
def test_flow_files_of_every_type(tmp_path: Path, dtype: str, largest: float) -> None:
    flow = np.random.default_rng(0).uniform(-largest, largest, size=(2, 24, 40)).astype(np.float32)
    path = tmp_path / "v" / "pair_00000.npy"
    path.parent.mkdir()
    write_flow(path, flow, dtype=dtype)
    bound = {"float32": 0, "float16": largest * 2**-11, "int16": largest / 32767 / 2, "int8": largest / 127 / 2}[dtype]
    assert np.abs(read_flow(path) - flow).max() <= bound * 1.001 + 1e-9
    assert list(path.parent.iterdir()) == [path]
    got = FlowReader(tmp_path, frame_size=(24, 40)).read("v", [0])
    assert np.abs(got[0] - flow).max() <= bound * 1.001 + largest * 2**-11 + 1e-7


def test_compact_flow_is_smaller(tmp_path: Path) -> None:
    flow = np.ones((2, 224, 398), np.float32)
    sizes = {}
    for dtype in FLOW_DTYPES:
        write_flow(tmp_path / dtype, flow, dtype=dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size
    assert sizes["float32"] / sizes["int8"] > 3.9
    assert sizes["float32"] / sizes["int16"] > 1.9


@pytest.mark.parametrize("keep", [0, 0.001, 0.5, 0.99])
def test_damaged_flow_is_an_error(dot: DotWorld, keep: float) -> None:
    _cut(dot.root / "flow/dot/pair_00002.npy", keep)
    with pytest.raises(FrameError, match=r"pair_00002.npy"):
        dot.readers()["flow"].read("dot", [2])


def test_flow_that_is_not_finite_or_not_numbers_is_an_error(dot: DotWorld) -> None:
    path = dot.root / "flow/dot/pair_00002.npy"
    flow = np.zeros((2, 64, 96), np.float32)
    for bad in (np.nan, np.inf, 1e6):
        flow[1, 5, 5] = bad
        np.save(path, flow)
        with pytest.raises(FrameError, match="not finite"):
            dot.readers()["flow"].read("dot", [2])
    with pytest.raises(ValueError, match="not finite"):
        write_flow(path, flow, dtype="float16")
    np.save(path, np.zeros((2, 64, 96), np.uint8))
    with pytest.raises(FrameError, match="type uint8"):
        dot.readers()["flow"].read("dot", [2])
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(FrameError, match=r"pair_00002.npy"):
        dot.readers()["flow"].read("dot", [2])


def _skeleton(frames: int = 6, persons: int | None = 2) -> dict[str, object]:
    shape = (frames, 17) if persons is None else (persons, frames, 17)
    return {
        "keypoint": np.full((*shape, 2), 10.0),
        "keypoint_score": np.ones(shape),
        "total_frames": frames,
        "img_shape": (128, 192),
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keypoint": None}, "the key 'keypoint' is missing; there are img_shape"),
        ({"img_shape": None}, "the key 'img_shape' is missing"),
        ({"total_frames": 9}, "total_frames=9, but keypoint has 6 rows"),
        ({"keypoint": np.zeros((2, 6, 18, 2))}, r"shape \(2, 6, 18, 2\)"),
        ({"keypoint_score": np.zeros((2, 5, 17))}, r"keypoint_score has shape \(2, 5, 17\)"),
        ({"keypoint": "text"}, "are not numbers"),
        ({"img_shape": (0, 5)}, "expected \\(height, width\\)"),
        ({"keypoint_score": -np.ones((2, 6, 17))}, "negative"),
    ],
)
def test_wrong_skeleton_files_name_the_key(tmp_path: Path, change: dict[str, object], named: str) -> None:
    entry = {k: v for k, v in {**_skeleton(), **change}.items() if v is not None}
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    with pytest.raises(FrameError, match=named):
        SkeletonReader(tmp_path, frame_size=(64, 96)).read("v", [0])


def test_nan_joints_are_absent_without_a_score_and_errors_with_one(tmp_path: Path) -> None:
    entry = _skeleton()
    entry["keypoint"][1, 3, 5] = np.nan  # type: ignore[index]
    entry["keypoint_score"][1, 3, 5] = 0  # type: ignore[index]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    got = SkeletonReader(tmp_path, frame_size=(64, 96)).read("v", range(6))
    assert not got[3, 1, 5].any()
    entry["keypoint_score"][1, 3, 5] = 0.5  # type: ignore[index]
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    reader = SkeletonReader(tmp_path, frame_size=(64, 96))
    reader.read("v", [0, 1, 2])
    with pytest.raises(FrameError, match="keypoint_score is not finite at frame 3, person 1, joint 5"):
        reader.read("v", [2, 3])


@pytest.mark.parametrize("persons", [None, 1, 2, 4])
def test_the_number_of_persons_is_always_the_same(tmp_path: Path, persons: int | None) -> None:
    entry = _skeleton(persons=persons)
    if persons == 4:
        entry["keypoint"] = np.arange(4.0)[:, None, None, None] * np.ones((4, 6, 17, 2))
        entry["keypoint_score"] = np.array([0.1, 0.9, 0.2, 0.8])[:, None, None] * np.ones((4, 6, 17))
    (tmp_path / "v.pkl").write_bytes(pickle.dumps(entry))
    got = SkeletonReader(tmp_path, frame_size=(128, 192)).read("v", [0])
    assert got.shape == (1, 2, 17, 3)
    if persons == 4:
        np.testing.assert_allclose(got[0, :, 0, 2], [0.9, 0.8])
        np.testing.assert_allclose(got[0, :, 0, 0], [1, 3], atol=1e-5)


def test_a_skeleton_file_is_unpickled_once_within_the_budget(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(_skeleton()))
    one = 6 * 2 * 17 * 3 * 4
    reader = SkeletonReader(tmp_path, frame_size=(64, 96), cache_bytes=2 * one)
    for name in "aabbaab":
        reader.read(name, [0])
    assert reader.files_read == 2
    for name in "cacb":  # c pushes out a, the least recently used; then a pushes out b
        reader.read(name, [0])
    assert reader.files_read == 5
    assert reader._cached <= 2 * one


def test_repeating_takes_the_nearest_readable_frame(dot: DotWorld) -> None:
    reader = dot.readers()["rgb"]
    whole = reader.read("dot", range(8))
    for k in (2, 3, 4, 7):
        (dot.root / f"frames/dot/{k:06d}.jpg").unlink()
    got, repeated = reader.read_with_repeats("dot", range(8))
    assert repeated == [2, 3, 4, 7]
    np.testing.assert_array_equal(got, whole[[0, 1, 1, 1, 5, 5, 6, 6]])
    with pytest.raises(FrameError):
        reader.read_with_repeats("dot", [2, 3])


def test_padding_after_the_end_marker_is_no_damage(dot: DotWorld) -> None:
    path = dot.root / "frames/dot/000002.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 40 + b"\n")
    assert dot.readers()["rgb"].read("dot", [2]).shape == (1, 64, 96, 3)
    path.write_bytes(whole[: len(whole) // 2] + b"\0" * (len(whole) // 2))  # a copy that stopped on a preallocated file
    with pytest.raises(FrameError, match="truncated JPEG"):
        dot.readers()["rgb"].read("dot", [2])


def test_progressive_and_grey_jpegs_decode(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    picture = np.full((16, 24), 200, np.uint8)
    cv2.imwrite(str(tmp_path / "v/000000.jpg"), picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    assert RgbReader(tmp_path, frame_size=(16, 24)).read("v", [0]).mean() == pytest.approx(200, abs=2)
