"""Videos to the tennis layout: right frames, resumable, and one broken video does not stop the others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.cli.prepare_data import _line
from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.clips import build_index
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import read_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.prepare.flow import flow_function
from mmdistill.prepare.pipeline import Outcome, Settings, prepare_all, prepare_video, stored_size
from mmdistill.prepare.video import VideoError, decode, find_videos, frame_rate, repeated_frames
from tests.commands import Script

ROOT = Path(__file__).resolve().parents[3]
REAL = ROOT.parent / "shared" / "data" / "tennis-video"
SIZE = (96, 160)  # of the source
SMALL = Settings(height=48, flow_dtype="float32")


def write_video(path: Path, *, frames: int = 20, fps: float = 25.0, seed: int = 0) -> Path:
    """A textured square that moves 4 px right and 2 px down per frame, on a textured background (MJPEG)."""
    rng = np.random.default_rng(seed)
    height, width = SIZE
    background = cv2.GaussianBlur(rng.integers(0, 80, (height, width, 3), np.uint8), (0, 0), 2)
    square = cv2.GaussianBlur(rng.integers(100, 255, (40, 40, 3), np.uint8), (0, 0), 1.5)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    assert writer.isOpened()
    for k in range(frames):
        picture = background.copy()
        x, y = 8 + 4 * k, 6 + 2 * k
        part = picture[y : y + 40, x : x + 40]
        part[:] = square[: part.shape[0], : part.shape[1]]
        writer.write(picture)
    writer.release()
    return path


def run(videos: dict[str, Path], output: Path, settings: Settings = SMALL) -> list[Outcome]:
    return prepare_all(videos, output, settings, workers=1, progress=lambda _: None)


def test_a_full_hd_frame_is_stored_as_224_x_398() -> None:
    assert stored_size(1080, 1920, 224) == (224, 398)
    assert stored_size(720, 1280, 224) == (224, 398)


def test_frames_and_flow_are_those_of_the_video(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi", fps=23.0)
    outcome = prepare_video("a", video, tmp_path / "out", SMALL)
    assert outcome.error is None
    assert outcome.record is not None
    assert outcome.record["num_frames"] == 20
    assert outcome.record["fps"] == pytest.approx(23.0, rel=1e-3)
    assert outcome.record["stored_size"] == [48, 80]
    frames = RgbReader(tmp_path / "out/vid_frames_224", frame_size=(48, 80)).read("a", range(20))
    for decoded in decode(video):
        wanted = cv2.resize(decoded.pixels, (80, 48), interpolation=cv2.INTER_AREA)[..., ::-1]
        assert np.abs(frames[decoded.number].astype(int) - wanted).mean() < 4  # JPEG, another frame differs by more
    flow = FlowReader(tmp_path / "out/tennis_flows", frame_size=(48, 80)).read("a", range(19))
    for k in (2, 10):  # the square's middle moves by half of (4, 2) px in the stored frame
        x, y = (8 + 4 * k + 20) // 2, (6 + 2 * k + 20) // 2
        np.testing.assert_allclose(np.median(flow[k, :, y - 3 : y + 4, x - 3 : x + 4], axis=(1, 2)), [2, 1], atol=0.3)


def test_many_videos_give_annotations_and_provenance(tmp_path: Path) -> None:
    videos = {name: write_video(tmp_path / f"{name}.avi", seed=i) for i, name in enumerate("ab")}
    broken = tmp_path / "c.avi"
    data = videos["a"].read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    (tmp_path / "d.mp4").write_bytes(b"no video")
    outcomes = run(find_videos(tmp_path), tmp_path / "out")
    by_name = {o.video: o for o in outcomes}
    assert [by_name[n].error for n in "ab"] == [None, None]
    assert "c.avi: truncated or broken, it ends after frame" in str(by_name["c"].error)
    assert "promises 20 frames" in str(by_name["c"].error)
    assert "d.mp4: cannot be opened" in str(by_name["d"].error)
    rallies = load_f3set(tmp_path / "out/unlabel.json")
    assert [(r.video, r.num_frames) for r in rallies] == [("a", 20), ("b", 20)]
    index = build_index(rallies, clips="windows", num_frames=8, label="video")
    assert (len(index.clips), index.classes) == (4, ("a", "b"))
    provenance = json.loads((tmp_path / "out/provenance.json").read_text())
    assert provenance["videos"]["a"]["parts"]["flow"]["method"] == "dis"
    assert provenance["flow"]["unit"] == "px of the stored frame"
    assert provenance["flow"]["pair"] == "pair k leads from frame k to frame k + 1"


def test_a_second_run_only_does_what_is_missing(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi")
    out = tmp_path / "out"
    prepare_video("a", video, out, SMALL)
    files = sorted((out / "vid_frames_224/a").iterdir()) + sorted((out / "tennis_flows/a").iterdir())
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    files[3].unlink()
    files[25].unlink()
    state = out / ".prepared/a.json"
    state.write_text(
        state.read_text().replace('"complete": true', '"complete": false')
    )  # as an interrupted run left it
    prepare_video("a", video, out, SMALL)
    after = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}
    assert {f for f in files if before[f][0] != after[f][0]} == {files[3], files[25]}
    assert all(before[f][1] == after[f][1] for f in files)
    stamp = state.stat().st_mtime_ns
    prepare_video("a", video, out, SMALL)
    assert state.stat().st_mtime_ns == stamp  # nothing to do
    files[4].unlink()
    assert prepare_video("a", video, out, SMALL).error is None
    assert files[4].exists()


def _tree(root: Path) -> dict[str, bytes]:
    kept = (p for p in root.rglob("*") if p.is_file() and not p.name.endswith(".json"))
    return {str(p.relative_to(root)): p.read_bytes() for p in kept}


def test_a_killed_run_is_finished_by_the_next_as_if_nothing_had_happened(tmp_path: Path) -> None:
    write_video(tmp_path / "a.avi", frames=24)
    arguments = ["--output", str(tmp_path / "out"), "--height", "48", "--workers", "1"]
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), str(tmp_path / "a.avi"), *arguments]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    flows = tmp_path / "out/tennis_flows/a"
    while process.poll() is None and not (flows.exists() and len(list(flows.iterdir())) > 3):
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert flows.exists()
    (flows / ".tmp-1-pair_00009.npy").write_bytes(b"half")  # what a kill in the middle of a write leaves
    run({"a": tmp_path / "a.avi"}, tmp_path / "out", Settings(height=48))
    run({"a": tmp_path / "a.avi"}, tmp_path / "whole", Settings(height=48))
    assert _tree(tmp_path / "out") == _tree(tmp_path / "whole")


def test_another_source_or_setting_replaces_only_its_part(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_video("a", write_video(tmp_path / "a.avi"), out, SMALL)
    picture, flow = out / "vid_frames_224/a/000000.jpg", out / "tennis_flows/a/pair_00000.npy"
    before = picture.stat().st_mtime_ns, flow.read_bytes()
    prepare_video("a", tmp_path / "a.avi", out, Settings(height=48, flow="farneback", flow_dtype="int8"))
    assert picture.stat().st_mtime_ns == before[0]
    assert flow.stat().st_size < len(before[1]) / 3
    other = write_video(tmp_path / "a.avi", frames=10, seed=5)
    outcome = prepare_video("a", other, out, SMALL)
    assert outcome.record is not None
    assert outcome.record["num_frames"] == 10
    assert len(list((out / "vid_frames_224/a").iterdir())) == 10
    assert len(list((out / "tennis_flows/a").iterdir())) == 9


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.avi")
    precious = tmp_path / "out/vid_frames_224/a/000000.jpg"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"mine")
    outcome = prepare_video("a", video, tmp_path / "out", SMALL)
    assert "already there and not made by this script" in str(outcome.error)
    assert precious.read_bytes() == b"mine"


def test_videos_are_found_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.MP4").touch()
    (tmp_path / "b.mkv").touch()
    (tmp_path / "note.txt").touch()
    assert sorted(find_videos(tmp_path)) == ["a", "b"]
    (tmp_path / "a.avi").touch()
    with pytest.raises(VideoError, match="have the same name"):
        find_videos(tmp_path)
    with pytest.raises(VideoError, match="no such file or folder"):
        find_videos(tmp_path / "nothing")


def test_frames_that_repeat_the_one_before_are_found() -> None:
    """25 fps footage stored at 30 fps repeats each sixth frame."""
    changes = [0.3 + 0.02 * (k % 4) for k in range(24)]
    for k in (5, 11, 17, 23):
        changes[k] = 0.01
    assert repeated_frames(changes) == [6, 12, 18, 24]
    assert repeated_frames([0.3] * 10) == []
    assert repeated_frames([0.0] * 10) == []


def test_frame_rates() -> None:
    assert frame_rate([0.0, 0.04, 0.08]) == pytest.approx(25)
    assert frame_rate([0.0]) == 0


@pytest.mark.parametrize(
    "wrong", [{"flow": "raft"}, {"skeleton": "x"}, {"flow_dtype": "f8"}, {"height": 1}, {"split": 2}]
)
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**wrong)  # type: ignore[arg-type]


def test_unknown_flow_is_named() -> None:
    with pytest.raises(ValueError, match="dis, farneback"):
        flow_function("raft")


def test_the_script_ends_with_a_status(tmp_path: Path, script: Script) -> None:
    write_video(tmp_path / "in.avi")
    done = script("prepare_data.py", tmp_path / "in.avi", "--output", tmp_path / "out", "--height", "48")
    assert done.returncode == 0, done.stderr
    assert "in: 20 frames at 25.00 fps, 48 x 80" in done.stderr
    assert script("prepare_data.py", tmp_path / "none", "--output", tmp_path / "out").returncode == 2
    (tmp_path / "bad.avi").write_bytes(b"x")
    failed = script("prepare_data.py", tmp_path / "bad.avi", "--output", tmp_path / "out")
    assert failed.returncode == 1
    assert "FAILED bad" in failed.stderr


@pytest.mark.skipif(not REAL.exists(), reason="the broadcast clips are not beside this repository")
def test_a_real_broadcast_clip(tmp_path: Path) -> None:
    cut = tmp_path / "clip3.mp4"
    shutil.copy(REAL / "clip3.mp4", cut)
    outcome = prepare_video("clip3", cut, tmp_path / "out", Settings(flow="none"))
    assert outcome.record is not None
    assert (outcome.record["num_frames"], outcome.record["stored_size"]) == (93, [224, 398])
    assert outcome.record["fps"] == pytest.approx(30, rel=1e-3)
    assert outcome.record["repeated_frames"] == list(range(3, 93, 6))  # 25 fps footage in a 30 fps file
    data = cut.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    assert "clip3.mp4" in str(prepare_video("other", cut, tmp_path / "out", Settings(flow="none")).error)


@pytest.mark.skipif(not REAL.exists(), reason="the broadcast clips are not beside this repository")
def test_flow_of_a_real_clip_explains_its_motion() -> None:
    greys = []
    for frame in decode(REAL / "clip8.mp4"):
        if frame.number in (128, 129):
            greys.append(cv2.cvtColor(cv2.resize(frame.pixels, (398, 224), interpolation=cv2.INTER_AREA), 6))
        if frame.number == 129:
            break
    flow = flow_function("dis")(*greys)
    ys, xs = np.mgrid[:224, :398].astype(np.float32)
    back = cv2.remap(greys[1], xs + flow[0], ys + flow[1], cv2.INTER_LINEAR).astype(float)
    moving = np.hypot(*flow) > 1
    assert moving.sum() > 30
    still = np.abs(greys[1].astype(float) - greys[0])[moving].mean()
    assert np.abs(back - greys[0])[moving].mean() < 0.8 * still  # without flow the ratio is 1


def test_flow_files_of_a_job_are_read_as_written(tmp_path: Path) -> None:
    for dtype in ("int16", "float16"):
        out = tmp_path / dtype
        prepare_video("a", write_video(tmp_path / "a.avi"), out, Settings(height=48, flow_dtype=dtype))
        exact = tmp_path / "exact"
        prepare_video("a", tmp_path / "a.avi", exact, SMALL)
        got, want = (read_flow(p / "tennis_flows/a/pair_00004.npy") for p in (out, exact))
        assert np.abs(got - want).max() < 0.01


def _slow_half(path: Path) -> None:
    """Make the second half of a 50-frame ``.mp4`` of 25 fps last twice as long, by its table of durations (stts)."""
    data = path.read_bytes()
    start, end, chain = 0, len(data), []
    for wanted in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"):
        while data[start + 4 : start + 8] != wanted:
            start += int.from_bytes(data[start : start + 4], "big")
            assert start < end
        chain.append(start)
        size = int.from_bytes(data[start : start + 4], "big")
        start, end = start + 8, start + size
    count, unit = (int.from_bytes(data[p : p + 4], "big") for p in (chain[-1] + 16, chain[-1] + 20))
    assert count == 50
    table = b"".join(number.to_bytes(4, "big") for number in (32, 0x73747473, 0, 2, 25, unit, 25, 2 * unit))
    out = bytearray(data[: chain[-1]] + table + data[end:])
    for box in chain[:-1]:
        out[box : box + 4] = (int.from_bytes(data[box : box + 4], "big") + 8).to_bytes(4, "big")
    path.write_bytes(out.replace(b"edts", b"free"))  # an edit list would cut the video at its old length


def test_a_variable_frame_rate_is_said(tmp_path: Path) -> None:
    """All frames are taken, with the decoder's own timestamps, and the line says that they are uneven."""
    video = tmp_path / "vfr.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"mp4v"), 25.0, (64, 48))
    for k in range(50):
        writer.write(np.full((48, 64, 3), 3 * k, np.uint8))
    writer.release()
    _slow_half(video)
    outcome = prepare_video("vfr", video, tmp_path / "out", Settings(height=48, flow="none"))
    assert outcome.record is not None
    expected = [0.04 * k for k in range(26)] + [1.0 + 0.08 * k for k in range(1, 25)]
    assert outcome.record["timestamps_s"] == pytest.approx(expected, abs=1e-4)
    assert outcome.record["fps"] == pytest.approx(49 / 2.92)
    assert "unevenly spaced (up to 0.4" in _line(outcome)


def test_a_file_with_fewer_frames_than_promised_says_so(tmp_path: Path) -> None:
    """Containers may only estimate, so a few are no error; but they are not lost in silence."""
    video = write_video(tmp_path / "a.avi", frames=100)
    data = video.read_bytes()
    video.write_bytes(data[: data.rindex(b"00dc", 0, data.rindex(b"idx1"))])
    outcome = prepare_video("a", video, tmp_path / "out", Settings(height=48, flow="none"))
    assert outcome.record is not None
    assert 97 <= outcome.record["num_frames"] < 100
    assert "the file promises 100" in _line(outcome)
