"""The command ``prepare``: exit status, the line of each video, and the next commands."""

import json
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from mmdistill.builders import make_clip_dataset
from mmdistill.cli import check_data
from mmdistill.cli.compute_stats import dataset_keys
from mmdistill.cli.prepare_data import _print_next_commands, format_result, main, next_commands
from mmdistill.config import DistillConfig, PretrainConfig
from mmdistill.config.compose import load_config
from mmdistill.data.annotations.base import Rally
from mmdistill.prepare.pipeline import PrepareResult
from tests.configs import pretrain_config
from tests.generated_video import write_frame_folder, write_moving_square, write_video

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
        ({"interlaced": True}, "interlaced, stored as progressive frames"),
        (
            {"hdr": "PQ"},
            "HDR with transfer function PQ: brightness and colors are not converted to SDR; convert the video "
            "for natural colors",
        ),
        ({"repeated_frames": [3, 9]}, "2 repeated frames (zero flow)"),
        ({"container_frame_count": 95}, "the container declares 95 frames"),
        ({"container_frame_count": 0}, "clip: 93 frames at 30.00 fps, 224 x 398"),
        (
            {"timestamps_s": [], "largest_timestamp_deviation_s": 0.46},
            "unevenly spaced (up to 0.460 s from the mean frame rate; see timestamps_s)",
        ),
        (
            {"skeleton_frames": {"frames": 93, "near": 85, "far": 50, "camera_moves": 0}},
            "near player found in 85 of 93 frames, far player in 50 of 93",
        ),
        (
            {"skeleton_frames": {"frames": 93, "near": 85, "far": 50, "camera_moves": 0, "near_changes": [35]}},
            "far player in 50 of 93, the near player is probably another person from frame 35 on",
        ),
        (
            {"skeleton_frames": {"frames": 93, "near": 85, "far": 40, "camera_moves": 12}},
            "far player in 40 of 93, camera motion in 12 frames, a player is not found in most frames: look at "
            "contact_sheets/clip.jpg, cut other shots, or change --split",
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
    shown = capsys.readouterr()
    assert "in: 20 frames at 25.00 fps, 48 x 80" in shown.err
    text = shown.out
    assert text.startswith(f"prepared 1 of 1 video in {out}; see {out}/provenance.json\nto check: ")
    assert f"prepared 1 of 1 video in {out}; see {out}/provenance.json" in text
    data_keys = f"data_module.target_data_dir={out} 'data_module.frame_size=[48,80]' 'data_module.crop_size=[48,80]'"
    assert f"--modalities rgb flow --output {out}/dataset/out.yaml {data_keys}\n" in text
    assert f"--config-dir={out} dataset=out modality=rgb,flow batch_size=1\n" in text
    assert "'trainer.teachers=[rgb,flow]' 'trainer.ckpt_path=[RGB,FLOW]' batch_size=1\n" in text
    assert "needs two videos of at least 33 frames" in text
    assert main([str(tmp_path / "in.avi"), "--output", str(out), "--height", "48", "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "in: prepared by an earlier run: 20 frames" in shown.err
    text = shown.out
    assert f"prepared 1 of 1 video in {out} (1 by an earlier run); see" in text
    (tmp_path / "bad.avi").write_bytes(b"x")
    assert main([str(tmp_path / "bad.avi"), "--output", str(out), "--workers", "1"]) == 1
    shown = capsys.readouterr()
    assert "FAILED bad: " in shown.err
    assert shown.out == f"prepared 0 of 1 video in {out}\n"


def test_different_shapes_and_rates_are_reported_with_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, shape, step in (("a", (64, 96), 40), ("b", (64, 64), 20)):
        images = [np.full((*shape, 3), 9 * k, np.uint8) for k in range(6)]
        write_video(tmp_path / f"{name}.mp4", images, times_ms=[step * k for k in range(6)])
    common = [str(tmp_path), "--workers", "1", "--flow", "none"]
    assert main([*common, "--output", str(tmp_path / "o"), "--height", "32"]) == 0
    captured = capsys.readouterr()
    assert "2 videos: about 12 files and 1 MB in" in captured.err
    shown = captured.out
    assert "the stored sizes differ: 32 x 32 (1 video), 32 x 48 (1 video); use --size 224x384 with --fit " in shown
    assert "the frame rates differ (25.00, 50.00 fps): clips show different times; use --fps 25" in shown
    (tmp_path / "o").rename(tmp_path / "prepared")
    assert main([*common, "--output", str(tmp_path / "p"), "--size", "32x48", "--fps", "25"]) == 0
    captured = capsys.readouterr()
    assert "sizes differ" not in captured.out
    assert "rates differ" not in captured.out
    assert "b: 3 frames at 25.00 fps, 32 x 48, the nearest of the video's frames at 25 fps" in captured.err


def test_a_full_disk_is_reported_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    write_moving_square(tmp_path / "a.avi")
    assert main([str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "choose another --output, a smaller --height, or --flow-dtype int8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mixed_sizes_and_flow_methods_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def record(size: list[int], method: str) -> dict[str, Any]:
        return {**RECORD, "stored_size": size, "parts": {"flow": {"method": method}, "skeleton": {"method": "none"}}}

    videos = {"a": record([48, 80], "dis"), "b": record([48, 64], "dis"), "c": record([48, 80], "farneback")}
    (tmp_path / "provenance.json").write_text(json.dumps({"videos": videos}))
    _print_next_commands(tmp_path, [PrepareResult("c", videos["c"], None)])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "the flow methods differ: dis (2 videos), farneback (1 video); repeat `prepare` for all videos with one --flow",
        "the stored sizes differ: 48 x 64 (1 video), 48 x 80 (2 videos); use --size 224x384 with --fit pad or --fit "
        "crop",
    ]


def test_missing_mediapipe_is_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    for name in ("a.avi", "b.avi"):
        (tmp_path / name).write_bytes(b"x")
    out = tmp_path / "out"
    assert main([str(tmp_path), "--output", str(out), "--skeleton", "mediapipe"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("pip install --no-deps mediapipe") == 1
    assert "FAILED" not in shown
    assert not out.exists()


def test_wrong_source_of_skeletons_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_moving_square(tmp_path / "a.avi")
    common = [str(tmp_path / "a.avi"), "--output", str(tmp_path / "out"), "--skeleton"]
    assert main([*common, "openpose"]) == 2
    assert "skeleton='openpose' is not one of mediapipe, vitpose, none, and not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([*common, "mediapipe", "--pose-model", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--pose-model and --detector-model need --skeleton vitpose" in capsys.readouterr().err
    assert main([*common, "vitpose", "--pose-model", str(tmp_path), "--detector-model", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert f"--detector-model {tmp_path}: cannot be loaded (" in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "out").exists()


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


def test_printed_commands_have_a_valid_config(tmp_path: Path) -> None:
    rallies = [Rally(f"v{k}", 400, 25.0, ()) for k in range(3)]
    lines = next_commands(Path("/d"), rallies, (100, 178), ["rgb", "flow"])
    assert [line.split(":")[0] for line in lines] == [
        "to check",
        "to compute the statistics",
        "to pretrain",
        "to distill",
        "to evaluate with the video as class",
    ]
    overrides = [[word for word in shlex.split(line) if "=" in word and not word.startswith("--")] for line in lines]
    data = load_config(PretrainConfig, "config_pretrain_tennis", ["modality=rgb", *overrides[1]]).data_module
    assert list(data.crop_size) == [96, 176]
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/d.yaml").write_text(
        "# @package data_module\n" + yaml.safe_dump(dataset_keys(data, ["flow"], [], None))
    )
    assert "--output /d/dataset/d.yaml" in lines[1]
    words = ["modality=rgb", *(word for word in overrides[2] if not word.startswith("modality="))]
    pretrain = load_config(PretrainConfig, "config_pretrain_tennis", words, config_dir=tmp_path)
    assert list(pretrain.data_module.crop_size) == [96, 176]
    load_config(DistillConfig, "config_mmdistill_tennis", overrides[3], config_dir=tmp_path)
    load_config(DistillConfig, "config_mmdistill_tennis", ["train=False", *overrides[4]], config_dir=tmp_path)


def test_commands_fit_short_videos_and_small_frames() -> None:
    (check, *_, last) = next_commands(Path("/d"), [Rally("a", 2, 25.0, ())], (48, 80), ["rgb"])
    assert check.startswith("to check: ")
    assert last == "a training needs a video of at least 3 frames; the longest has 2 frames"
    short = next_commands(Path("/d"), [Rally("a", 16, 25.0, ())], (48, 80), ["rgb"])
    assert short[1].endswith(" data_module.num_frames=14")
    assert short[-1].startswith("an evaluation with the video as class needs two videos of at least 29 frames")
    for size in ((30, 50), (16, 9)):
        _, small = next_commands(Path("/d"), [Rally("a", 40, 25.0, ())], size, ["rgb"])
        assert small.startswith(f"frames of {size[0]} x {size[1]} px are too small for a training (data_module.")
        assert small.endswith("; increase --height")


def test_repeated_command_replaces_only_the_statistics_of_this_folder(tmp_path: Path) -> None:
    def statistics() -> str:
        return next_commands(tmp_path, [Rally("a", 40, 25.0, ())], (48, 80), ["rgb"])[1]

    config = tmp_path / "dataset" / f"{tmp_path.name}.yaml"
    config.parent.mkdir()
    assert "--force" not in statistics()
    for content, is_replaced in (
        (f"# @package data_module\ntarget_data_dir: {tmp_path}\n", True),
        ("target_data_dir: data/other\n", False),
        ("a: [\n", False),
    ):
        config.write_text(content)
        assert (f"--output {config} --force data_module." in statistics()) == is_replaced


def test_dataset_config_has_another_name_than_those_in_configs() -> None:
    for folder, name in (("/d/my data", "my_data"), ("/d/tennis", "my_tennis"), ("/d/mine", "mine")):
        lines = next_commands(Path(folder), [Rally("a", 40, 25.0, ())], (48, 80), ["rgb"])
        assert f"dataset={name} " in lines[2]


def _write_matches(folder: Path) -> Path:
    """Two matches of 20 frames at 25 fps with two rallies each, and their annotations; one match in a subfolder."""
    matches = {"2014-W_F-A_B-C_D": folder / "a", "2015-X": folder / "a/deeper"}
    rallies = []
    for seed, (name, parent) in enumerate(matches.items()):
        parent.mkdir()
        write_moving_square(parent / f"{name}.avi", seed=seed)
        for start, stop in ((0, 12), (8, 19)):
            video, events = f"{name}_{start}_{stop}", [{"frame": 5, "label": f"stroke_{start}"}]
            rallies.append({"video": video, "num_frames": stop - start, "fps": 25.0, "events": events})
    (folder / "val.json").write_text(json.dumps(rallies))
    return folder / "val.json"


def test_rallies_of_matches_are_complete_training_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, out = _write_matches(tmp_path), tmp_path / "out"
    command = [str(tmp_path / "a"), "--annotations", str(annotations), "--output", str(out), "--height", "48"]
    assert main([*command, "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("4 rallies of 2 videos: about 92 files and 1 MB in")
    assert "2014-W_F-A_B-C_D_8_19: 11 frames at 25.00 fps, 48 x 80" in shown.err
    assert shown.out.startswith(f"prepared 4 of 4 rallies in {out}; see ")
    check, *_, evaluate = shown.out.splitlines()[1:]
    assert check.startswith(f"to check: mmdistill check-data {annotations} --root {out} --modalities rgb flow ")
    assert evaluate.startswith("to evaluate: ")
    assert evaluate.endswith(f"ckpt_path=PATH data_module.fewshot_eval_json_path={annotations}")
    assert check_data.main([*shlex.split(check)[4:], "--workers", "1"]) == 0
    assert "complete" in capsys.readouterr().out
    keys = [f"target_data_dir={out}", "frame_size=[48,80]", "crop_size=[48,80]", "num_frames=4", "patch_size=8"]
    keys += ["name=mine", "frames_dir=vid_frames_224", "flow_dir=tennis_flows", "unlabel_json_path=unlabel.json"]
    config = pretrain_config(*(f"data_module.{key}" for key in keys))
    dataset = make_clip_dataset(config.data_module, ("rgb", "flow"), training=True, seed=0)
    shapes = {(dataset[0, k]["rgb"].shape, dataset[0, k]["flow"].shape) for k in range(len(dataset))}
    assert shapes == {((4, 48, 80, 3), (4, 2, 48, 80))}


def test_matches_that_cannot_be_cut_exit_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = _write_matches(tmp_path)
    (tmp_path / "a/deeper/2015-X.avi").rename(tmp_path / "a/2015-Y.avi")
    command = [str(tmp_path / "a"), "--annotations", str(annotations), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "1 match without a video" in (error := capsys.readouterr().err)
    assert error.endswith("\n  2015-X; did you mean 2015-Y?\n")
    assert main([*command, "--fps", "25"]) == 2
    assert "--fps changes frame numbers" in capsys.readouterr().err
    rallies = json.loads(annotations.read_text())
    annotations.write_text(json.dumps([*rallies, rallies[0]]))
    assert main(command) == 2
    assert "2014-W_F-A_B-C_D_0_12: this video occurs twice" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_failed_match_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, video = _write_matches(tmp_path), tmp_path / "a/deeper/2015-X.avi"
    video.write_bytes(video.read_bytes()[:9000])
    command = [str(tmp_path / "a"), "--annotations", str(annotations), "--output", str(tmp_path / "out")]
    assert main([*command, "--flow", "none", "--workers", "1"]) == 1
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if line.startswith("FAILED")]
    assert line.startswith(f"FAILED 2015-X_0_12 and 1 more: {video}: ")
    assert shown.out.startswith("prepared 2 of 4 rallies in")


def test_folder_of_jpegs_has_an_unknown_frame_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_frame_folder(tmp_path / "v/clip_1", [np.full((32, 48, 3), 20 * k, np.uint8) for k in range(6)], first=1)
    write_moving_square(tmp_path / "v/b.avi")
    command = [str(tmp_path / "v"), "--output", str(tmp_path / "out"), "--size", "32x48", "--flow", "none"]
    assert main([*command, "--workers", "1"]) == 0
    shown = capsys.readouterr()
    assert "clip_1: 6 frames at an unknown frame rate, 32 x 48\n" in shown.err
    assert "rates differ" not in shown.out
