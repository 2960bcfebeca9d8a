"""Rallies of a match: names and frame rates; exact frames, flow and skeletons; errors, and resumption."""

import hashlib
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.data.annotations.base import UNKNOWN_FPS, AnnotationError, Rally
from mmdistill.files import atomic_write_bytes
from mmdistill.prepare import pipeline, skeleton_sources
from mmdistill.prepare.pipeline import Settings, estimate_output, prepare_match, prepare_video, write_annotations
from mmdistill.prepare.player_tracking import ReadFrames
from mmdistill.prepare.pose import SkeletonCounts, estimate_in_crops, write_skeletons
from mmdistill.prepare.rallies import FrameSpool, RallySpan, check_frame_rate, spans_by_match
from mmdistill.prepare.sources import decode_frames
from mmdistill.prepare.video import VideoError
from tests.generated_video import write_frame_folder, write_moving_square, write_video
from tests.unit.prepare.conftest import TwoPlayers

FILE = Path("val.json")
SMALL = Settings(height=32, flow_dtype="float32")
SPANS = [RallySpan("m_3_20", 3, 20, 25.0), RallySpan("m_15_41", 15, 41, 25.0), RallySpan("m_50_60", 50, 60, 25.0)]


def test_rallies_are_grouped_by_match_and_sorted(caplog: pytest.LogCaptureFixture) -> None:
    names = {"2014-M_W-F-A_B-C_30_50": 20, "2014-M_W-F-A_B-C_5_45": 40, "x_0_7": 7}
    rallies = [Rally(name, count, 29.0, ()) for name, count in names.items()]
    videos = {name: Path(f"{name}.mkv") for name in ("2014-M_W-F-A_B-C", "x", "other")}
    spans = spans_by_match(rallies, videos, FILE)
    assert {match: [(s.start, s.stop, s.fps) for s in found] for match, found in spans.items()} == {
        "2014-M_W-F-A_B-C": [(5, 45, 29.0), (30, 50, 29.0)],
        "x": [(0, 7, 29.0)],
    }
    assert [record.message for record in caplog.records] == ["val.json: no rally of 1 video, skipping other"]


def test_all_matches_without_a_video_are_named() -> None:
    rallies = [Rally(f"{match}_0_5", 5, 25.0, ()) for match in ("b", "Wimbledon_F", "a")]
    videos = {"b": Path("b.mp4"), "Wimbledon-F": Path("Wimbledon-F.mp4")}
    with pytest.raises(VideoError, match=r"val\.json: 2 matches without a video") as error:
        spans_by_match(rallies, videos, FILE)
    assert str(error.value).endswith(":\n  Wimbledon_F; did you mean Wimbledon-F?\n  a")


def test_matches_other_than_the_given_one_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    rallies = [Rally(f"{match}_{start}_9", 9 - start, 25.0, ()) for match in "abc" for start in (0, 4)]
    spans = spans_by_match(rallies, {"b": Path("b.mp4")}, FILE, skip_missing=True)
    assert list(spans) == ["b"]
    assert caplog.messages == ["val.json: skipping 4 rallies of 2 other matches, because the source is one video"]
    with pytest.raises(VideoError, match="3 matches without a video"):
        spans_by_match(rallies, {"d": Path("d.mp4")}, FILE, skip_missing=True)


def test_wrong_name_and_length_are_named() -> None:
    rallies = [Rally("clip", 5, 25.0, ()), Rally("m_10_20", 11, 25.0, ()), Rally("m_0_5", 5, 25.0, ())]
    with pytest.raises(AnnotationError, match="2 rallies cannot be cut out of a match: clip: the name is not") as error:
        spans_by_match(rallies, {"m": Path("m.mp4")}, FILE)
    assert "m_10_20: num_frames=11 is not END - START = 10" in str(error.value)
    with pytest.raises(AnnotationError, match=r"cut out of a match: m_50_20: END = 20 lies before START = 50; prepare"):
        spans_by_match([Rally("m_50_20", 30, 25.0, ())], {"m": Path("m.mp4")}, FILE)


@pytest.mark.parametrize(
    ("annotated", "rates", "is_accepted"),
    [
        (29.0, [29.97], True),  # F3Set truncates frame rates
        (23.0, [23.976], True),
        (30.0, [29.97], True),
        (25.0, [25.02], True),
        (59.0, [59.94], True),
        (29.97, [30.0], True),
        (UNKNOWN_FPS, [12.0], True),
        (25.0, [0.0], True),  # a folder of JPEGs
        (12.0, [29.5, 12.0], True),  # the mean over the timestamps differs from the declared rate
        (29.5, [29.5, 12.0], True),
        (29.0, [30.0], False),
        (25.0, [24.0], False),
        (29.0, [59.94], False),
        (25.0, [50.0], False),
        (25.0, [29.5, 12.0], False),
    ],
)
def test_frame_rate_is_compared(annotated: float, rates: list[float], is_accepted: bool) -> None:
    spans = [RallySpan("m_0_5", 0, 5, annotated)]
    if is_accepted:
        check_frame_rate(Path("m.mp4"), spans, *rates)
        return
    with pytest.raises(VideoError, match=rf"m\.mp4: has {rates[-1]:.2f} fps, but .* annotated at {annotated:g} fps"):
        check_frame_rate(Path("m.mp4"), spans, *rates)


def test_spooled_frames_are_equal_in_each_pass(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    spool = FrameSpool(tmp_path / "a.raw")
    for image in images:
        spool.add(image)
    for _ in range(2):
        np.testing.assert_array_equal([frame.pixels for frame in spool.read()], images)
    spool.remove()
    assert not list(tmp_path.iterdir())


def file_contents(root: Path) -> dict[str, bytes]:
    """Content of every file below `root`, by relative path."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def moving_images(count: int) -> list[np.ndarray]:
    """A textured image that moves by 2 px per frame."""
    wide = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 96 + 2 * count, 3), np.uint8), (0, 0), 2)
    return [wide[:, 2 * k : 2 * k + 96] for k in range(count)]


@pytest.fixture(scope="module")
def match(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """H.264 with B-frames and one key frame: seeking to a frame is not exact."""
    return write_video(tmp_path_factory.mktemp("match") / "m.mp4", moving_images(60))


@pytest.fixture(scope="module")
def whole(match: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the whole match."""
    out = tmp_path_factory.mktemp("whole")
    assert prepare_video("m", match, out, SMALL).error is None
    return out


def check_rally(span: RallySpan, out: Path, whole: Path) -> None:
    """Frame k is frame START + k of the match, and pair k is pair START + k."""
    count = span.stop - span.start
    frames, flows = file_contents(out / "vid_frames_224" / span.name), file_contents(out / "tennis_flows" / span.name)
    assert sorted(frames) == [f"{k:06d}.jpg" for k in range(count)]
    assert sorted(flows) == [f"pair_{k:05d}.npy" for k in range(count - 1)]
    for k in range(count):
        assert frames[f"{k:06d}.jpg"] == (whole / f"vid_frames_224/m/{span.start + k:06d}.jpg").read_bytes()
    for k in range(count - 1):
        assert flows[f"pair_{k:05d}.npy"] == (whole / f"tennis_flows/m/pair_{span.start + k:05d}.npy").read_bytes()


def test_rallies_have_the_frames_and_the_flow_of_the_match(match: Path, whole: Path, tmp_path: Path) -> None:
    results = prepare_match(match, SPANS, tmp_path, SMALL)
    assert [(r.video, r.error, r.reused) for r in results] == [(span.name, None, False) for span in SPANS]
    for span in SPANS:
        check_rally(span, tmp_path, whole)
    assert [(r.video, r.num_frames, round(r.fps, 3)) for r in write_annotations(tmp_path)] == [
        ("m_15_41", 26, 25.0),
        ("m_3_20", 17, 25.0),
        ("m_50_60", 10, 25.0),
    ]
    assert results[0].record is not None
    assert results[0].record["match_frames"] == [3, 20]
    before = file_contents(tmp_path)
    assert all(result.reused for result in prepare_match(match, SPANS, tmp_path, SMALL))
    assert file_contents(tmp_path) == before


def test_a_match_is_decoded_once(match: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[int] = []
    starts = itertools.count()

    def counted(path: Path, needs_pixels: object) -> object:
        next(starts)
        for frame in decode_frames(path, needs_pixels):  # type: ignore[arg-type]
            if frame.pixels.size:
                converted.append(frame.number)
            yield frame

    monkeypatch.setattr(pipeline, "decode_frames", counted)
    prepare_match(match, SPANS, tmp_path, replace(SMALL, flow="none"))
    assert next(starts) == 1
    assert converted == [*range(3, 41), *range(50, 60)]


def fake_pose(crop: np.ndarray) -> np.ndarray:
    """17 joints that depend on the pixels of the crop."""
    joints = np.full((17, 3), 0.5, np.float32)
    joints[0, :2] = crop[0, 0, :2] / 255
    return joints


def test_skeletons_are_those_of_the_frames_of_a_rally(
    two_players: TwoPlayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeleton_sources, "load_mediapipe", lambda: estimate_in_crops(fake_pose))
    spans = [RallySpan("v_0_14", 0, 14, UNKNOWN_FPS), RallySpan("v_10_24", 10, 24, 25.0)]
    results = prepare_match(two_players.path, spans, tmp_path, replace(SMALL, flow="none", skeleton="mediapipe"))
    assert [result.error for result in results] == [None, None]
    assert all(result.record and result.record["skeleton_frames"]["near"] > 10 for result in results)
    frames, pose = list(two_players.read()), estimate_in_crops(fake_pose)
    for span in spans:
        rally = [replace(frame, number=k) for k, frame in enumerate(frames[span.start : span.stop])]
        expected = tmp_path / f"{span.name}.pkl"
        write_skeletons(lambda rally=rally: rally, expected, tmp_path / "sheet.jpg", split=0.4, pose=pose)
        written = tmp_path / f"skeletons/f3set-tennis/{span.name}.pkl"
        assert written.read_bytes() == expected.read_bytes()
        assert pickle.loads(written.read_bytes())["keypoint"].shape == (2, span.stop - span.start, 17, 2)
        assert (tmp_path / f"contact_sheets/{span.name}.jpg").read_bytes() == (tmp_path / "sheet.jpg").read_bytes()
    assert not list(tmp_path.glob("mmdistill-*"))  # the temporary files of the frames


def write_hash(read: ReadFrames, target: Path, sheet: Path, **_: object) -> SkeletonCounts:
    """Stands for `write_skeletons`, which takes seconds: the hash of the frames in two passes."""
    numbers, passes = (
        [frame.number for frame in read()],
        [[frame.pixels.tobytes() for frame in read()] for _ in range(2)],
    )
    assert passes[0] == passes[1]
    for path in (target, sheet):
        atomic_write_bytes(path, hashlib.sha256(b"".join(passes[0])).digest())
    return SkeletonCounts(len(numbers), len(numbers), len(numbers), 0, [], [])


@pytest.mark.parametrize(("name", "calls"), [("write_flow", 20), ("_write_jpeg", 50), ("write_skeletons", 1)])
@pytest.mark.parametrize("pack", [False, True])
def test_interrupted_match_resumes_to_an_identical_folder(
    match: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: int, pack: bool
) -> None:
    monkeypatch.setattr(skeleton_sources, "load_mediapipe", lambda: estimate_in_crops(fake_pose))
    monkeypatch.setattr(skeleton_sources, "write_skeletons", write_hash)
    module = skeleton_sources if name == "write_skeletons" else pipeline
    settings = replace(SMALL, skeleton="mediapipe", pack=pack)
    prepare_match(match, SPANS, tmp_path / "expected", settings)
    original, count = getattr(module, name), itertools.count()

    def stop(*args: object, **options: object) -> object:
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_match(match, SPANS, tmp_path / "out", settings)
    assert file_contents(tmp_path / "out") != file_contents(tmp_path / "expected")
    results = prepare_match(match, SPANS, tmp_path / "out", settings)
    assert [result.error for result in results] == [None] * 3
    assert file_contents(tmp_path / "out") == file_contents(tmp_path / "expected")


def test_rally_beyond_the_end_is_rejected_by_name(match: Path, tmp_path: Path) -> None:
    spans = [SPANS[0], RallySpan("m_50_61", 50, 61, 25.0), RallySpan("m_70_80", 70, 80, 25.0)]
    errors = [result.error for result in prepare_match(match, spans, tmp_path, replace(SMALL, flow="none"))]
    assert errors[0] is None
    assert "m.mp4: m_50_61 ends at frame 61, but the video has 60 frames; get the video that was" in str(errors[1])
    assert "m_70_80 ends at frame 80" in str(errors[2])
    assert [rally.video for rally in write_annotations(tmp_path)] == ["m_3_20"]


def test_incomplete_download_is_rejected_with_all_rallies(tmp_path: Path) -> None:
    video = write_moving_square(tmp_path / "m.avi", frames=60)
    data, settings, out = video.read_bytes(), replace(SMALL, flow="none"), tmp_path / "out"
    assert {result.error for result in prepare_match(video, SPANS, out, settings)} == {None}
    assert len(write_annotations(out)) == 3
    video.write_bytes(data[: len(data) * 3 // 4])  # contains the first two rallies
    for _ in range(2):
        errors = {result.error for result in prepare_match(video, SPANS, out, settings)}
        assert len(errors) == 1
        assert "m.avi: truncated or broken, it ends after frame" in str(errors.pop())
        assert write_annotations(out) == []


def test_other_frame_rate_than_annotated_is_rejected_before_any_work(match: Path, tmp_path: Path) -> None:
    spans = [replace(span, fps=29.0) for span in SPANS]
    errors = {result.error for result in prepare_match(match, spans, tmp_path / "out", SMALL)}
    assert "m.mp4: has 25.00 fps, but its rallies are annotated at 29 fps" in str(errors.pop())
    assert not errors
    assert not (tmp_path / "out").exists()


def test_variable_frame_rate_does_not_change_the_frame_numbers(tmp_path: Path) -> None:
    times = [40 * k for k in range(30)] + [1200 + 120 * k for k in range(30)]  # 12.6 fps on average
    video = write_video(tmp_path / "m.mkv", moving_images(60), times_ms=times)
    settings, spans = replace(SMALL, flow="none"), [RallySpan("m_20_45", 20, 45, 12.6)]
    (result,) = prepare_match(video, [replace(spans[0], fps=50.0)], tmp_path / "out", settings)
    assert "annotated at 50 fps" in str(result.error)
    (result,) = prepare_match(video, spans, tmp_path / "out", settings)
    assert result.record is not None, result.error
    assert result.record["timestamps_s"] == pytest.approx([(ms - times[20]) / 1000 for ms in times[20:45]], abs=2e-3)
    prepare_video("m", video, tmp_path / "whole", settings)
    first, expected = tmp_path / "out/vid_frames_224/m_20_45/000003.jpg", tmp_path / "whole/vid_frames_224/m/000023.jpg"
    assert first.read_bytes() == expected.read_bytes()


def test_match_of_numbered_jpegs_has_the_annotated_frame_rate(tmp_path: Path) -> None:
    folder = write_frame_folder(tmp_path / "m", moving_images(30), first=1, pattern="frame_{:010d}.jpg")
    (result,) = prepare_match(folder, [RallySpan("m_4_12", 4, 12, 29.0)], tmp_path / "out", replace(SMALL, height=64))
    assert result.record is not None, result.error
    assert result.record["fps"] == 29.0
    written = file_contents(tmp_path / "out/vid_frames_224/m_4_12")
    assert written == {f"{k:06d}.jpg": (folder / f"frame_{5 + k:010d}.jpg").read_bytes() for k in range(8)}


def test_estimate_counts_the_rallies(match: Path, tmp_path: Path) -> None:
    files, num_bytes = estimate_output({"m": match}, SMALL, {"m": SPANS})
    prepare_match(match, SPANS, tmp_path, SMALL)
    written = [path for path in tmp_path.glob("*/m_*/*") if path.is_file()]
    assert files - 3 == len(written)  # one pair less than frames
    assert 0.6 * num_bytes < sum(path.stat().st_size for path in written) < 1.1 * num_bytes
    spooled = estimate_output({"m": match}, replace(SMALL, skeleton="mediapipe"), {"m": SPANS})[1] - num_bytes
    assert spooled == 26 * 64 * 96 * 3
