"""Preparation of videos: correct frames and flow, resumable, and one broken video does not stop the others."""

import itertools
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.clips import ClipSpec, build_index
from mmdistill.data.readers import flow_file
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import read_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.prepare import outputs, pipeline
from mmdistill.prepare.pipeline import Settings, estimate_output, prepare_all, prepare_video
from mmdistill.prepare.sources import find_videos
from mmdistill.prepare.video import decode_frames
from tests.generated_video import BroadcastClip, write_frame_folder, write_moving_square, write_video

SMALL = Settings(height=48, flow_dtype="float32")


def file_contents(root: Path) -> dict[str, bytes]:
    """Content of every data file below `root`, by relative path."""
    files = (p for p in root.rglob("*") if p.is_file() and not p.name.endswith(".json"))
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def test_full_hd_frame_is_stored_as_224_x_398() -> None:
    assert Settings().placement((1080, 1920)).stored == (224, 398)
    assert Settings().placement((720, 1280)).stored == (224, 398)


def test_frames_and_flow_match_the_video(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi", fps=23.0)
    result = prepare_video("a", video, tmp_path / "out", SMALL)
    assert result.error is None
    assert result.record is not None
    assert result.record["num_frames"] == 20
    assert result.record["container_frame_count"] == 20
    assert result.record["fps"] == pytest.approx(23.0, rel=1e-3)
    assert result.record["stored_size"] == [48, 80]
    frames = RgbReader(tmp_path / "out/vid_frames_224", frame_size=(48, 80)).read("a", range(20))
    for decoded in decode_frames(video):
        expected = cv2.resize(decoded.pixels, (80, 48), interpolation=cv2.INTER_AREA)[..., ::-1]
        # the tolerance is for JPEG; another frame differs by more
        assert np.abs(frames[decoded.number].astype(int) - expected).mean() < 4
    flow = FlowReader(tmp_path / "out/tennis_flows", frame_size=(48, 80)).read("a", range(19))
    for k in (2, 10):  # the center of the square moves by half of (4, 2) px in the stored frame
        x, y = (8 + 4 * k + 20) // 2, (6 + 2 * k + 20) // 2
        np.testing.assert_allclose(np.median(flow[k, :, y - 3 : y + 4, x - 3 : x + 4], axis=(1, 2)), [2, 1], atol=0.3)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_mixed_shapes_become_one_dataset(tmp_path: Path, fit: str) -> None:
    shapes = {"wide": (72, 128), "portrait": (128, 72), "square": (96, 96)}
    for name, shape in shapes.items():
        write_video(tmp_path / f"{name}.mp4", [np.full((*shape, 3), 40 * k, np.uint8) for k in range(4)])
    settings = Settings(size=(48, 80), fit=fit, flow_dtype="float32")
    videos = find_videos(tmp_path)
    results = [prepare_video(name, path, tmp_path / "out", settings) for name, path in videos.items()]
    assert [r.error for r in results] == [None] * 3
    reader = RgbReader(tmp_path / "out/vid_frames_224", frame_size=(48, 80))
    for name in shapes:
        assert reader.read(name, range(4)).shape == (4, 48, 80, 3)
    again = [prepare_video(name, path, tmp_path / "out", settings) for name, path in videos.items()]
    assert all(result.reused for result in again)


def test_another_frame_rate_is_recorded(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi", fps=50.0)
    record = prepare_video("a", video, tmp_path / "out", replace(SMALL, fps=25.0)).record
    assert record is not None
    assert (record["num_frames"], record["fps"]) == (10, pytest.approx(25.0))
    assert record["parts"]["frames"]["fps"] == 25.0
    assert len(list((tmp_path / "out/tennis_flows/a").iterdir())) == 9


def test_estimated_files_and_bytes_bound_the_written_ones(tmp_path: Path) -> None:
    videos = {"a": write_moving_square(tmp_path / "a.avi")}
    files, num_bytes = estimate_output(videos, SMALL)
    prepare_video("a", videos["a"], tmp_path / "out", SMALL)
    written = [p for p in (tmp_path / "out").glob("*/a/*") if p.is_file()]
    assert files - 1 == len(written)  # one pair less than frames
    assert 0.6 * num_bytes < sum(p.stat().st_size for p in written) < 1.1 * num_bytes
    assert estimate_output({"d": tmp_path / "nothing.mp4"}, SMALL) == (0, 0)


def test_annotations_and_provenance_list_the_complete_videos(tmp_path: Path) -> None:
    videos = {name: write_moving_square(tmp_path / f"{name}.avi", seed=i) for i, name in enumerate("ab")}
    data = videos["a"].read_bytes()
    (tmp_path / "c.avi").write_bytes(data[: len(data) // 2])
    (tmp_path / "d.mp4").write_bytes(b"no video")
    results = prepare_all(find_videos(tmp_path), tmp_path / "out", SMALL, workers=1, progress=lambda _: None)
    by_name = {r.video: r for r in results}
    assert [by_name[n].error for n in "ab"] == [None, None]
    assert "c.avi: truncated or broken, it ends after frame" in str(by_name["c"].error)
    assert "the container declares 20 frames" in str(by_name["c"].error)
    assert "d.mp4: not a video" in str(by_name["d"].error)
    rallies = load_f3set(tmp_path / "out/unlabel.json")
    assert [(r.video, r.num_frames) for r in rallies] == [("a", 20), ("b", 20)]
    index = build_index(rallies, ClipSpec("windows", 8, label="video"))
    assert (len(index.clips), index.classes) == (4, ("a", "b"))
    provenance = json.loads((tmp_path / "out/provenance.json").read_text())
    assert provenance["videos"]["a"]["parts"]["flow"]["method"] == "dis"
    assert provenance["flow"]["unit"] == "px of the stored frame"
    assert provenance["flow"]["pair"] == "pair k is the flow from frame k to frame k + 1"


def test_second_run_writes_only_missing_files(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    out = tmp_path / "out"
    prepare_video("a", video, out, SMALL)
    files = sorted((out / "vid_frames_224/a").iterdir()) + sorted((out / "tennis_flows/a").iterdir())
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    files[3].unlink()
    files[25].unlink()
    record = out / ".prepared/a.json"
    record.write_text(record.read_text().replace('"complete": true', '"complete": false'))  # as after an interruption
    prepare_video("a", video, out, SMALL)
    after = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    assert {f for f in files if before[f][0] != after[f][0]} == {files[3], files[25]}
    assert all(before[f][1] == after[f][1] for f in files)
    time = record.stat().st_mtime_ns
    prepare_video("a", video, out, SMALL)
    assert record.stat().st_mtime_ns == time  # nothing to do
    files[4].unlink()
    assert prepare_video("a", video, out, SMALL).error is None
    assert files[4].exists()


def test_interrupted_run_is_completed_by_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_moving_square(tmp_path / "a.avi", frames=12)
    write_flow = pipeline.write_flow

    def interrupt_at_pair_4(path: Path, flow: np.ndarray, *, dtype: str) -> None:
        if path.name == "pair_00004.npy":
            path.with_name(".tmp-1-pair_00004.npy").write_bytes(b"half")  # what a kill during a write leaves
            raise KeyboardInterrupt
        write_flow(path, flow, dtype=dtype)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_flow", interrupt_at_pair_4)
        with pytest.raises(KeyboardInterrupt):
            prepare_video("a", video, tmp_path / "out", SMALL)
    assert len(file_contents(tmp_path / "out")) == 6 + 4 + 1
    assert pipeline.write_annotations(tmp_path / "out") == []
    prepare_video("a", video, tmp_path / "out", SMALL)
    prepare_video("a", video, tmp_path / "uninterrupted", SMALL)
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "uninterrupted")


def test_changed_source_or_setting_replaces_only_its_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_video("a", write_moving_square(tmp_path / "a.avi"), out, SMALL)
    image, flow = out / "vid_frames_224/a/000000.jpg", out / "tennis_flows/a/pair_00000.npy"
    before = image.stat().st_mtime_ns, flow.read_bytes()
    prepare_video("a", tmp_path / "a.avi", out, Settings(height=48, flow="farneback", flow_dtype="int8"))
    assert image.stat().st_mtime_ns == before[0]
    assert flow.stat().st_size < len(before[1]) / 3
    other = write_moving_square(tmp_path / "a.avi", frames=10, seed=5)
    result = prepare_video("a", other, out, SMALL)
    assert result.record is not None
    assert result.record["num_frames"] == 10
    assert len(list((out / "vid_frames_224/a").iterdir())) == 10
    assert len(list((out / "tennis_flows/a").iterdir())) == 9


PACKED = replace(SMALL, pack=True)
PACKED_FILES = ["tennis_flows/a/flow.npy", "vid_frames_224/a/frames.zip"]


def _samples(out: Path) -> tuple[np.ndarray, np.ndarray]:
    frames = RgbReader(out / "vid_frames_224", frame_size=(48, 80)).read("a", range(20))
    return frames, FlowReader(out / "tennis_flows", frame_size=(48, 80)).read("a", range(19))


def test_packed_files_give_identical_samples(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    for dtype in ("float16", "int8"):
        out, packed = tmp_path / dtype, tmp_path / f"packed-{dtype}"
        settings = replace(SMALL, flow_dtype=dtype)
        plain = prepare_video("a", video, out, settings)
        result = prepare_video("a", video, packed, replace(settings, pack=True))
        assert result.record == plain.record
        for expected, found in zip(_samples(out), _samples(packed), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert sorted(file_contents(packed)) == PACKED_FILES
        assert prepare_video("a", video, packed, settings).reused
        again = prepare_video("a", video, out, replace(settings, pack=True))  # packs the files of the first run
        assert again.reused
        assert file_contents(out) == file_contents(packed)
    assert estimate_output({"a": video}, PACKED)[0] == 2
    assert estimate_output({"a": video}, PACKED)[1] == 2 * estimate_output({"a": video}, SMALL)[1]


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (pipeline, "write_flow", 12),
        (outputs, "write_zip", 0),
        (zipfile.ZipFile, "writestr", 5),
        (outputs, "pack_flow", 0),
        (flow_file, "_load", 9),
        (Path, "unlink", 3),  # while the separate frames are removed
        (Path, "unlink", 25),  # while the separate flow is removed
    ],
)
def test_interrupted_packing_resumes_to_identical_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int
) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    prepare_video("a", video, tmp_path / "expected", PACKED)
    original, count = getattr(owner, name), itertools.count()

    def stop(*args: object, **options: object) -> object:
        is_temporary = name == "unlink" and ".tmp-" in str(args[0])
        if not is_temporary and next(count) == calls:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_video("a", video, tmp_path / "out", PACKED)
    assert sorted(file_contents(tmp_path / "out")) != PACKED_FILES
    assert prepare_video("a", video, tmp_path / "out", PACKED).error is None
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "expected")


def test_truncated_packed_files_are_written_again(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    prepare_video("a", video, tmp_path, PACKED)
    expected = file_contents(tmp_path)
    for name in PACKED_FILES:
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-10])
    result = prepare_video("a", video, tmp_path, PACKED)
    assert (result.error, result.reused) == (None, False)
    assert file_contents(tmp_path) == expected


def test_another_flow_method_replaces_the_packed_flow_only(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    prepare_video("a", video, tmp_path / "out", PACKED)
    before = file_contents(tmp_path / "out")
    assert prepare_video("a", video, tmp_path / "out", replace(PACKED, flow="farneback")).error is None
    after = file_contents(tmp_path / "out")
    assert sorted(after) == PACKED_FILES
    assert [before[name] == after[name] for name in PACKED_FILES] == [False, True]


def test_files_of_other_origin_are_never_replaced(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "a.avi")
    existing = tmp_path / "out/vid_frames_224/a/000000.jpg"
    existing.parent.mkdir(parents=True)
    existing.write_bytes(b"mine")
    result = prepare_video("a", video, tmp_path / "out", SMALL)
    assert "vid_frames_224/a exists and was not written by mmdistill; choose another" in str(result.error)
    assert existing.read_bytes() == b"mine"


@pytest.mark.parametrize(
    "wrong", [{"flow": "raft"}, {"skeleton": "x"}, {"flow_dtype": "f8"}, {"height": 1}, {"split": 2}]
)
def test_wrong_setting_is_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


def _check_broadcast(source: Path, work: Path, expected: dict[str, object], repeated: list[int]) -> None:
    """Repeated frames are found, and the first half of the file is rejected."""
    video = work / source.name
    shutil.copy(source, video)
    result = prepare_video("clip", video, work / "out", Settings(flow="none"))
    assert result.record is not None
    assert {key: result.record[key] for key in expected} == expected
    assert result.record["fps"] == pytest.approx(30, rel=1e-3)
    assert result.record["repeated_frames"] == repeated  # 25 fps content in a 30 fps file
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    assert source.name in str(prepare_video("other", video, work / "out", Settings(flow="none")).error)


def test_generated_broadcast_clip(tmp_path: Path, broadcast: BroadcastClip) -> None:
    expected = {"num_frames": broadcast.num_frames, "source_size": [720, 1280], "stored_size": [224, 398]}
    _check_broadcast(broadcast.path, tmp_path, expected, broadcast.repeated)


def test_real_broadcast_clip(tmp_path: Path, real_broadcasts: Path) -> None:
    expected = {"num_frames": 93, "stored_size": [224, 398]}
    _check_broadcast(real_broadcasts / "clip3.mp4", tmp_path, expected, list(range(3, 93, 6)))


@pytest.mark.parametrize("dtype", ["int16", "float16"])
def test_compressed_flow_is_close_to_float32(tmp_path: Path, dtype: str) -> None:
    video = write_moving_square(tmp_path / "a.avi", frames=6)
    prepare_video("a", video, tmp_path / dtype, Settings(height=48, flow_dtype=dtype))
    prepare_video("a", video, tmp_path / "exact", SMALL)
    stored, exact = (read_flow(tmp_path / name / "tennis_flows/a/pair_00004.npy") for name in (dtype, "exact"))
    assert np.abs(stored - exact).max() < 0.01


def test_variable_frame_rate_is_recorded(tmp_path: Path) -> None:
    """All frames are stored, and the record has the timestamps of the decoder."""
    images = [np.full((48, 64, 3), 3 * k, np.uint8) for k in range(50)]
    times_ms = [40 * k for k in range(26)] + [1000 + 80 * k for k in range(1, 25)]
    video = write_video(tmp_path / "vfr.mp4", images, times_ms=times_ms)
    result = prepare_video("vfr", video, tmp_path / "out", Settings(height=48, flow="none"))
    assert result.record is not None
    assert result.record["timestamps_s"] == pytest.approx([ms / 1000 for ms in times_ms], abs=1e-4)
    assert result.record["fps"] == pytest.approx(49 / 2.92)
    assert 0.4 <= result.record["largest_timestamp_deviation_s"] < 0.5


def test_fewer_frames_than_declared_are_recorded(tmp_path: Path) -> None:
    """Containers may only estimate their frame count: a small difference is no error, but it is recorded."""
    video = write_moving_square(tmp_path / "a.avi", frames=100)
    data = video.read_bytes()
    video.write_bytes(data[: data.rindex(b"00dc", 0, data.rindex(b"idx1"))])
    result = prepare_video("a", video, tmp_path / "out", Settings(height=48, flow="none"))
    assert result.record is not None
    assert 97 <= result.record["num_frames"] < 100
    assert result.record["container_frame_count"] == 100


def test_frames_of_another_dataset_are_copied_and_get_flow(tmp_path: Path) -> None:
    images = [np.full((48, 80, 3), 10 * k, np.uint8) for k in range(5)]
    folder = write_frame_folder(tmp_path / "frames/P01/P01_01", images, first=1, pattern="frame_{:010d}.jpg")
    out, videos = tmp_path / "out", find_videos(tmp_path / "frames")
    (result,) = prepare_all(videos, out, SMALL, workers=1, progress=lambda _: None)
    assert result.record is not None, result.error
    assert result.record["fps"] == -1
    for k in range(5):
        source = folder / f"frame_{k + 1:010d}.jpg"
        assert (out / f"vid_frames_224/P01/P01_01/{k:06d}.jpg").read_bytes() == source.read_bytes()
    assert len(list((out / "tennis_flows/P01/P01_01").iterdir())) == 4
    assert [(r.video, r.num_frames, r.fps) for r in load_f3set(out / "unlabel.json")] == [("P01/P01_01", 5, -1)]
    assert prepare_video("P01/P01_01", folder, out, SMALL).reused
    (folder / "frame_0000000003.jpg").unlink()
    assert "1 frame missing (3)" in str(prepare_video("P01/P01_01", folder, out, SMALL).error)


def test_flow_is_computed_next_to_existing_frames(tmp_path: Path) -> None:
    """The frames of F3Set may lie in the output folder. They are neither copied nor removed."""
    images = [np.full((48, 80, 3), 10 * k, np.uint8) for k in range(5)]
    folder = write_frame_folder(tmp_path / "vid_frames_224/a", images)
    before = file_contents(folder)
    assert "--pack would remove these files" in str(prepare_video("a", folder, tmp_path, PACKED).error)
    assert "choose another --output" in str(prepare_video("a", folder, tmp_path, replace(SMALL, height=32)).error)
    for settings in (SMALL, replace(SMALL, flow="farneback", quality=50)):
        assert prepare_video("a", folder, tmp_path, settings).error is None
        assert prepare_video("a", folder, tmp_path, settings).reused
    assert file_contents(folder) == before
    assert len(list((tmp_path / "tennis_flows/a").iterdir())) == 4
    other = write_moving_square(tmp_path / "a.avi")
    assert "was not written by mmdistill" in str(prepare_video("a", other, tmp_path, SMALL).error)
    assert file_contents(folder) == before
    shifted = write_frame_folder(tmp_path / "vid_frames_224/b", images, first=1)
    assert "not named 000000.jpg, 000001.jpg" in str(prepare_video("b", shifted, tmp_path, SMALL).error)
