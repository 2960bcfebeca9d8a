"""The command ``prepare``: exit status, the line of each video, and the next commands."""

from pathlib import Path
from typing import Any

import pytest

from mmdistill.cli.prepare_data import format_result, main, next_commands
from mmdistill.config import DistillConfig, PretrainConfig
from mmdistill.config.compose import load_config
from mmdistill.data.annotations.base import Rally
from mmdistill.prepare.pipeline import PrepareResult
from tests.generated_video import write_moving_square

RECORD: dict[str, Any] = {
    "num_frames": 93,
    "container_frame_count": 93,
    "fps": 30.0,
    "largest_timestamp_deviation_s": 0.0,
    "repeated_frames": [],
    "stored_size": [224, 398],
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "clip: 93 frames at 30.00 fps, 224 x 398"),
        ({"repeated_frames": [3, 9]}, "2 repeated frames (zero flow)"),
        ({"container_frame_count": 95}, "the container declares 95 frames"),
        ({"container_frame_count": 0}, "clip: 93 frames at 30.00 fps, 224 x 398"),
        (
            {"timestamps_s": [], "largest_timestamp_deviation_s": 0.46},
            "variable frame rate (up to 0.460 s from the mean rate; see timestamps_s)",
        ),
        (
            {"skeleton_frames": {"frames": 93, "near": 85, "far": 40}},
            "near player found in 85 of 93 frames, far player in 40 of 93",
        ),
    ],
)
def test_line_of_a_video(changes: dict[str, Any], expected: str) -> None:
    line = format_result(PrepareResult("clip", {**RECORD, **changes}, None))
    assert line.endswith(expected)


def test_line_of_a_failed_video() -> None:
    assert (
        format_result(PrepareResult("bad", None, "bad.avi: cannot be opened"))
        == "FAILED bad: bad.avi: cannot be opened"
    )


def test_exit_status_and_next_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_moving_square(tmp_path / "in.avi")
    out = tmp_path / "out"
    assert main([str(tmp_path / "in.avi"), "--output", str(out), "--height", "48", "--workers", "1"]) == 0
    text = capsys.readouterr().err
    assert "in: 20 frames at 25.00 fps, 48 x 80" in text
    assert f"prepared 1 of 1 video in {out}; see {out}/provenance.json" in text
    data_keys = f"data_module.target_data_dir={out} data_module.frame_size=[48,80] data_module.crop_size=[48,80]"
    assert f"modality=rgb,flow {data_keys} batch_size=1\n" in text
    assert "trainer.teachers=[rgb,flow] trainer.ckpt_path=[RGB,FLOW] data_module" in text
    assert "needs two videos of at least 33 frames" in text
    (tmp_path / "bad.avi").write_bytes(b"x")
    assert main([str(tmp_path / "bad.avi"), "--output", str(out), "--workers", "1"]) == 1
    assert "FAILED bad: " in capsys.readouterr().err


def test_missing_source_and_wrong_setting_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert "none: no such file or folder" in capsys.readouterr().err
    assert main([str(tmp_path), "--output", str(tmp_path / "out"), "--split", "2"]) == 2
    assert "split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lengths", "n_way", "q_sample"),
    [([40, 49], 2, 1), ([40, 60, 16], 2, 1), ([400] * 7, 5, 15), ([400, 400, 90], 3, 4)],
)
def test_evaluation_command_fits_the_videos(lengths: list[int], n_way: int, q_sample: int) -> None:
    rallies = [Rally(f"v{k}", length, 25.0, ()) for k, length in enumerate(lengths)]
    *_, line = next_commands(Path("/d"), rallies, (100, 178), ["rgb", "flow"])
    assert f"data_module.n_way={n_way} data_module.q_sample={q_sample}" in line


def test_printed_commands_have_a_valid_config() -> None:
    rallies = [Rally(f"v{k}", 400, 25.0, ()) for k in range(3)]
    lines = next_commands(Path("/d"), rallies, (100, 178), ["rgb", "flow"])
    assert [line.split(":")[0] for line in lines] == [
        "to check",
        "to pretrain",
        "to distill",
        "to evaluate with the video as class",
    ]
    overrides = [[word for word in line.split() if "=" in word and not word.startswith("--")] for line in lines]
    pretrain = load_config(PretrainConfig, "config_pretrain_tennis", ["modality=rgb", *overrides[1][1:]])
    assert list(pretrain.data_module.crop_size) == [96, 176]
    load_config(DistillConfig, "config_mmdistill_tennis", overrides[2])
    load_config(DistillConfig, "config_mmdistill_tennis", ["train=False", *overrides[3]])


def test_videos_without_a_clip_have_no_command() -> None:
    (line,) = next_commands(Path("/d"), [Rally("a", 16, 25.0, ())], (48, 80), ["rgb"])
    assert "no video has the 17 frames of a clip" in line
