"""Convert video files to training data: frames, flow, skeletons and an annotation file in the tennis layout.

    mmdistill prepare my_videos --output data/mine
    mmdistill prepare match.mp4 --output data/mine --skeleton mediapipe --flow farneback
    mmdistill prepare my_videos --output data/mine --skeleton vitpose --pose-model models/vitpose
    mmdistill prepare matches --annotations val.json --output data/f3set

A folder of numbered JPEGs is a video too. With --annotations the rallies MATCH_START_END of an F3Set file are cut out
of the videos MATCH: frame k of a rally is frame START + k of the match, and END is the first frame after the rally.

An interrupted run can be repeated; it computes only what is missing. The exit status is 1 if a video failed, or if a
player is found in less than half of its frames.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.cli.video_classes import video_class_overrides
from mmdistill.config import ConfigError, PretrainConfig
from mmdistill.config.compose import configs_dir, load_config
from mmdistill.console import ProgressDisplay
from mmdistill.data.annotations.base import UNKNOWN_FPS, Rally
from mmdistill.data.annotations.f3set import load_f3set
from mmdistill.data.clips import ClipSpec, build_index
from mmdistill.data.cores import available_cores
from mmdistill.data.readers.flow_file import FLOW_DTYPES
from mmdistill.errors import InputError, format_count, format_first
from mmdistill.modalities import BUILTIN_MODALITIES
from mmdistill.prepare.flow import FLOW_METHODS
from mmdistill.prepare.outputs import SHEET_DIR
from mmdistill.prepare.pipeline import PrepareResult, Settings, estimate_output, prepare_all
from mmdistill.prepare.placement import FITS
from mmdistill.prepare.rallies import spans_by_match
from mmdistill.prepare.sources import find_videos
from mmdistill.prepare.vitpose import DETECTOR_MODEL, POSE_MODEL


@report_errors("prepare", ValueError, continues=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the videos, print a summary and the next commands. Returns the exit status."""
    options = _arguments(argv)
    settings = Settings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(Settings)})
    videos = find_videos(options.source)
    rallies = None
    if options.annotations:
        if settings.fps is not None:
            raise InputError("--fps changes frame numbers, and --annotations contains frame numbers; omit --fps")
        is_file = options.source.is_file()  # of one match, in an annotation file of many
        rallies = spans_by_match(load_f3set(options.annotations), videos, options.annotations, skip_missing=is_file)
        videos = {name: videos[name] for name in rallies}
    needed = estimate_output(videos, settings, rallies, workers=options.workers)
    names = f"{format_count(sum(map(len, rallies.values())), 'rally')} of " if rallies else ""
    _check_disk_space(f"{names}{format_count(len(videos), 'video')}", needed, options.output)
    done = itertools.count(1)
    with ProgressDisplay("videos", len(videos)) as display:

        def progress(results: list[PrepareResult]) -> None:
            display.update(next(done))
            for line in format_results(results):
                display.print(line)

        results = prepare_all(
            videos, options.output, settings, workers=options.workers, progress=progress, rallies=rallies
        )
    _print_next_commands(options.output, results, options.annotations)
    return 1 if any(r.error or r.lacks_a_player for r in results) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("prepare", __doc__)
    parser.add_argument("source", type=Path, help="a video file, or a folder with video files or folders of JPEGs")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="FILE",
        help="F3Set JSON file: cut its rallies MATCH_START_END out of the videos MATCH (default: prepare whole videos)",
    )
    parser.add_argument(
        "--height", type=int, default=224, help="height of the stored frames in px; the width keeps the aspect ratio"
    )
    parser.add_argument(
        "--size",
        type=_parse_size,
        metavar="HEIGHTxWIDTH",
        help="size of all stored frames in px, for videos of different aspect ratios (default: by --height)",
    )
    parser.add_argument("--fit", choices=FITS, default="pad", help="with --size: add black borders, or cut borders off")
    parser.add_argument("--fps", type=float, help="frame rate of the stored frames (default: every frame of the video)")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100")
    parser.add_argument("--flow", choices=[*FLOW_METHODS, "none"], default="dis", help="optical flow method")
    parser.add_argument("--flow-dtype", choices=FLOW_DTYPES, default="float16", help="number format of the flow files")
    parser.add_argument(
        "--skeleton",
        default="none",
        metavar="{mediapipe,vitpose,none,DIR}",
        help="pose network, whose installation docs/own_data.md describes, or a folder with a skeleton file VIDEO.pkl "
        "of each video, which is checked and drawn (default: none)",
    )
    model = "a folder that transformers wrote, or a name on the Hugging Face Hub, which is downloaded once"
    parser.add_argument(
        "--pose-model",
        default=POSE_MODEL,
        metavar="DIR_OR_HUB_ID",
        help=f"ViTPose of --skeleton vitpose: {model} (default: %(default)s)",
    )
    parser.add_argument(
        "--detector-model",
        default=DETECTOR_MODEL,
        metavar="DIR_OR_HUB_ID",
        help="person detector of --skeleton vitpose, for example RT-DETR, given as --pose-model (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        type=float,
        default=0.4,
        help="vertical position that separates the players, 0 (top) to 1 (bottom): the near player stands below it",
    )
    parser.add_argument(
        "--pack",
        action="store_true",
        help="store the frames of a video in one frames.zip and its flow in one flow.npy",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        help="number of processes; each prepares one video at a time (default: all cores of this job)",
    )
    options = parser.parse_args(argv)
    models = (options.pose_model, options.detector_model)
    if options.skeleton != "vitpose" and models != (POSE_MODEL, DETECTOR_MODEL):
        parser.error("--pose-model and --detector-model need --skeleton vitpose")
    return options


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, such as 224x384")
    return int(height), int(width)


def _check_disk_space(videos: str, estimate: tuple[int, int], output: Path) -> None:
    """Print the files and bytes that the videos need. Raises `InputError` if the disk has less space."""
    files, needed = estimate
    folder = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free
    space = f"about {format_count(files, 'file')} and {_format_bytes(needed)} in {output}"
    space = f"{space}, {_format_bytes(free)} are free"
    print(f"{videos}: {space}", file=sys.stderr)
    if needed > free and not output.exists():
        raise InputError(f"{space}; choose another --output, a smaller --height, or --flow-dtype int8")


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{math.ceil(count / 1e6)} MB"


def format_results(results: Sequence[PrepareResult]) -> list[str]:
    """The log lines of the rallies of a video: one line for each, or one line if all have the same error."""
    errors = {result.error for result in results}
    if len(results) > 1 and len(errors) == 1 and None not in errors:
        names = format_first([result.video for result in results], 1)
        return [f"FAILED {names}: {results[0].error}"]
    return [format_result(result) for result in results]


def format_result(result: PrepareResult) -> str:
    """The log line of one video."""
    if result.record is None:
        return f"FAILED {result.video}: {result.error}"
    record = result.record
    frames = record["num_frames"]
    height, width = record["stored_size"]
    rate = "an unknown frame rate" if record["fps"] == UNKNOWN_FPS else f"{record['fps']:.2f} fps"
    details = [f"{format_count(frames, 'frame')} at {rate}", f"{height} x {width}"]
    declared = record.get("container_frame_count", 0)
    if (fps := record.get("parts", {}).get("frames", {}).get("fps")) is not None:
        details.append(f"the nearest of the video's frames at {fps:g} fps")
    elif declared not in (0, frames):
        details.append(f"the container declares {format_count(declared, 'frame')}")
    if record.get("interlaced"):
        details.append("interlaced, stored as progressive frames")
    if record.get("hdr"):
        hdr = f"HDR with transfer function {record['hdr']}"
        details.append(f"{hdr}: brightness and colors are not converted to SDR; convert the video for natural colors")
    if "timestamps_s" in record:
        deviation = record["largest_timestamp_deviation_s"]
        details.append(f"unevenly spaced (up to {deviation:.3f} s from the mean frame rate; see timestamps_s)")
    if record["repeated_frames"]:
        details.append(f"{format_count(len(record['repeated_frames']), 'repeated frame')} (zero flow)")
    if "skeleton_frames" in record:
        found = record["skeleton_frames"]
        details.append(
            f"near player found in {found['near']} of {format_count(frames, 'frame')}, far player in "
            f"{found['far']} of {frames}"
        )
        if found["camera_moves"]:
            details.append(f"camera motion in {format_count(found['camera_moves'], 'frame')}")
        for name in ("near", "far"):
            if changes := found.get(f"{name}_changes"):  # which earlier versions do not record
                frames_shown = format_first(changes, 3)
                details.append(f"the {name} player is probably another person from frame {frames_shown} on")
    if result.lacks_a_player:
        sheet = f"{SHEET_DIR}/{result.video}.jpg"
        details.append(f"a player is not found in most frames: look at {sheet}, cut other shots, or change --split")
    reused = "prepared by an earlier run: " if result.reused else ""
    return f"{result.video}: {reused}{', '.join(details)}"


def _print_next_commands(output: Path, results: list[PrepareResult], annotations: Path | None = None) -> None:
    complete = [r.record for r in results if r.record]
    done = f"prepared {len(complete)} of {format_count(len(results), 'rally' if annotations else 'video')} in {output}"
    if not complete:
        print(done)
        return
    num_reused = sum(result.reused for result in results)
    reused = f" ({num_reused} by an earlier run)" if num_reused else ""
    lines = [f"{done}{reused}; see {output}/provenance.json"]
    records = list(json.loads((output / "provenance.json").read_bytes())["videos"].values())
    methods = Counter(record["parts"]["flow"]["method"] for record in records)
    if len(methods) > 1:
        fix = "repeat `prepare` for all videos with one --flow"
        lines.append(f"the flow methods differ: {_format_videos(methods)}; {fix}")
    sizes = Counter(tuple(record["stored_size"]) for record in records)
    if len(sizes) > 1:
        counts = _format_videos({f"{height} x {width}": count for (height, width), count in sizes.items()})
        lines.append(f"the stored sizes differ: {counts}; use --size 224x384 with --fit pad or --fit crop")
    rates = sorted({round(record["fps"], 2) for record in records} - {UNKNOWN_FPS})
    if len(rates) > 1 and rates[-1] > 1.01 * rates[0]:
        shown = ", ".join(f"{rate:.2f}" for rate in rates)
        lines.append(f"the frame rates differ ({shown} fps): clips show different times; use --fps {rates[0]:g}")
    if len(sizes) == 1:
        absent = {kind for record in records for kind, part in record["parts"].items() if part.get("method") == "none"}
        modalities = [name for name in BUILTIN_MODALITIES if name not in absent]
        rallies = load_f3set(output / "unlabel.json")
        lines += next_commands(output.resolve(), rallies, next(iter(sizes)), modalities, annotations)
    print("\n".join(lines))


def _format_videos(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({format_count(count, 'video')})" for name, count in sorted(counts.items()))


def next_commands(
    output: Path,
    rallies: Sequence[Rally],
    frame_size: tuple[int, int],
    modalities: Sequence[str],
    annotations: Path | None = None,
) -> list[str]:
    """The commands that check, compute statistics, pretrain, distill and evaluate, with values that fit these videos.

    Args:
        output: absolute path of the data folder.
        rallies: the prepared videos.
        frame_size: (height, width) of the stored frames in px.
        modalities: the prepared ones.
        annotations: the labeled file of the rallies; None: the class of the evaluation is the video.
    """
    config = load_config(PretrainConfig, "config_pretrain_tennis", ["modality=rgb"])
    data = config.data_module
    checked = annotations.resolve() if annotations else output / "unlabel.json"
    check = ["check-data", str(checked), "--root", str(output), "--modalities", *modalities]
    lines = [_command_line("check", [*check, "--frame-size", *map(str, frame_size)])]
    longest = max(rally.num_frames for rally in rallies)
    num_frames = min(data.num_frames, (longest - 1) // data.tubelet * data.tubelet)
    if num_frames == 0:
        needed = f"a training needs a video of at least {data.tubelet + 1} frames"
        return [*lines, f"{needed}; the longest has {format_count(longest, 'frame')}"]
    height, width = frame_size
    crop_height, crop_width = (side // data.patch_size * data.patch_size for side in frame_size)
    keys = [f"target_data_dir={output}", f"frame_size=[{height},{width}]", f"crop_size=[{crop_height},{crop_width}]"]
    if num_frames != data.num_frames:
        keys.append(f"num_frames={num_frames}")
    keys = [f"data_module.{key}" for key in keys]
    try:
        load_config(PretrainConfig, "config_pretrain_tennis", ["modality=rgb", *keys])
    except ConfigError as error:
        return [*lines, f"frames of {height} x {width} px are too small for a training ({error}); increase --height"]
    index = build_index(rallies, ClipSpec("windows", num_frames, label="video"))
    batch_size = [f"batch_size={len(index.clips)}"] if len(index.clips) < config.batch_size else []
    config_path = output / "dataset" / f"{_dataset_name(output)}.yaml"
    pretrain, distill = "--config-name=config_pretrain_tennis", "--config-name=config_mmdistill_tennis"
    dataset = [f"--config-dir={output}", f"dataset={config_path.stem}"]
    force = ["--force"] if _is_config_of(config_path, output) else []
    statistics = ["compute-stats", pretrain, "--modalities", *modalities, "--output", str(config_path), *force, *keys]
    sweep = ["-m"] if len(modalities) > 1 else []
    names = ",".join(modalities)
    teachers = [f"trainer.teachers=[{names}]", f"trainer.ckpt_path=[{names.upper()}]"]
    lines += [
        _command_line("compute the statistics", statistics),
        _command_line("pretrain", ["pretrain", *sweep, pretrain, *dataset, f"modality={names}", *batch_size]),
        _command_line("distill", ["distill", distill, *dataset, "test=False", *teachers, *batch_size]),
    ]
    if annotations:
        labeled = ["ckpt_path=PATH", f"data_module.fewshot_eval_json_path={annotations.resolve()}"]
        return [*lines, _command_line("evaluate", ["evaluate", distill, *dataset, *labeled])]
    classes = video_class_overrides(index.clips, "unlabel.json", data.n_way, data.q_sample)
    if classes is None:
        needed = f"two videos of at least {2 * num_frames + 1} frames"
        return [*lines, f"an evaluation with the video as class needs {needed}; give labels, or prepare more videos"]
    evaluate = ["evaluate", distill, *dataset, "ckpt_path=PATH", *classes]
    return [*lines, _command_line("evaluate with the video as class", evaluate)]


def _command_line(purpose: str, words: Sequence[str]) -> str:
    return f"to {purpose}: {shlex.join(['mmdistill', *words])}"


def _is_config_of(path: Path, output: Path) -> bool:
    """Whether `path` is the dataset config of the folder `output`, which `compute-stats` wrote earlier."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and content.get("target_data_dir") == str(output)


def _dataset_name(output: Path) -> str:
    """Name of the dataset config in the data folder. Hydra would prefer a config of the same name in ``configs/``."""
    name = re.sub(r"\W", "_", output.name)
    return f"my_{name}" if (configs_dir() / "dataset" / f"{name}.yaml").exists() else name
