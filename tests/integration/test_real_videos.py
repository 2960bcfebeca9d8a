"""Real videos of the kinds that users own, which only some machines have, prepared and checked by the commands."""

import itertools
import json
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdistill.cli.main import main as mmdistill
from mmdistill.cli.prepare_data import _print_next_commands, format_result
from mmdistill.prepare.pipeline import PrepareResult, Settings, prepare_video, write_annotations
from mmdistill.prepare.sources import find_videos
from mmdistill.prepare.video import VideoError, decode_frames
from tests.commands import ROOT

CORPUS = ROOT.parent / "shared" / "data" / "world" / "videos"
# frames and reported property of each video
VIDEOS = {
    "four_by_three": (40, ""),
    "portrait": (40, ""),
    "square": (40, ""),
    "cut_without_reencoding": (50, ""),
    "variable_rate_webm": (72, "unevenly spaced"),
    "variable_rate_mkv": (72, "unevenly spaced"),
    "interlaced_h264": (20, "interlaced"),
    "interlaced_mpeg2": (20, "interlaced"),
    "rally": (40, ""),
    "camcorder": (25, ""),
}
pytestmark = pytest.mark.skipif(not CORPUS.is_dir(), reason="the real videos are not next to this repository")


def prepare(videos: dict[str, Path], output: Path, settings: Settings) -> list[PrepareResult]:
    """Like `prepare_all`, in this process."""
    results = [prepare_video(name, path, output, settings) for name, path in videos.items()]
    write_annotations(output)
    return results


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PrepareResult]]:
    """The output folder and the results of all videos, in one size, without flow."""
    paths = [*CORPUS.glob("*.*"), *find_videos(CORPUS / "mac_disk").values()]
    stems = [path.stem for path in paths]
    videos = {p.stem if stems.count(p.stem) == 1 else f"{p.stem}_{p.suffix[1:]}": p for p in sorted(paths)}
    output = tmp_path_factory.mktemp("real") / "out"
    return output, prepare(videos, output, Settings(size=(112, 192), flow="none"))


def test_all_frames_of_each_video_are_stored(prepared: tuple[Path, list[PrepareResult]]) -> None:
    output, results = prepared
    assert [result.error for result in results] == [None] * len(VIDEOS)
    lines = {result.video: format_result(result) for result in results}
    assert {name: int(line.split()[1]) for name, line in lines.items()} == {
        n: count for n, (count, _) in VIDEOS.items()
    }
    for name, (_, text) in VIDEOS.items():
        assert text in lines[name]
        assert ("unevenly" in lines[name], "interlaced" in lines[name]) == ("unevenly" in text, "interlaced" in text)
    unlabel = str(output / "unlabel.json")
    check = ["check-data", unlabel, "--root", str(output), "--modalities", "rgb", "--frame-size", "112", "192"]
    assert mmdistill([*check, "--workers", "1"]) == 0


def test_interlaced_frames_are_neither_black_nor_frozen() -> None:
    for name in ("interlaced_h264.mp4", "interlaced_mpeg2.ts"):
        frames = [frame.pixels.astype(int) for frame in decode_frames(CORPUS / name)]
        assert np.mean(frames) == pytest.approx(123, abs=3)
        assert min(np.abs(b - a).mean() for a, b in itertools.pairwise(frames)) > 3


@pytest.mark.parametrize("name", ["four_by_three", "portrait", "square"])
def test_printed_check_runs_for_any_aspect_ratio(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = prepare({name: CORPUS / f"{name}.mp4"}, tmp_path, Settings(height=64))
    _print_next_commands(tmp_path, results)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to check: "))
    assert mmdistill([*shlex.split(line)[3:], "--workers", "1"]) == 0
    image = cv2.imread(str(tmp_path / f"vid_frames_224/{name}/000000.jpg"))
    assert (
        list(image.shape[:2]) == json.loads((tmp_path / "provenance.json").read_text())["videos"][name]["stored_size"]
    )


@pytest.mark.parametrize(
    "video", ["cut_without_reencoding.mp4", "square.mp4", "interlaced_h264.mp4", "mac_disk/rally.mp4"]
)
def test_half_a_file_is_rejected(tmp_path: Path, video: str) -> None:
    data = (CORPUS / video).read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(VideoError, match=r"half\.mp4: "):
        list(decode_frames(tmp_path / "half.mp4"))
