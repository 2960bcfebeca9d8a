"""Convert video files to training data: frames, flow, skeletons and an annotation file in the tennis layout.

    mmdistill prepare VIDEO_OR_DIR --output data/mine [--skeleton mediapipe] [--flow farneback]

An interrupted run can be repeated; it computes only what is missing. The exit status is 1 if any video failed.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmdistill.cli.parser import make_parser
from mmdistill.data.readers.flow_file import FLOW_DTYPES
from mmdistill.errors import format_count
from mmdistill.prepare.flow import FLOW_METHODS
from mmdistill.prepare.pipeline import PrepareResult, Settings, prepare_all
from mmdistill.prepare.video import VideoError, find_videos


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the videos, print a summary and the next commands. Returns the exit status."""
    options = _arguments(argv)
    console = Console(stderr=True)
    try:
        settings = Settings(
            height=options.height,
            quality=options.quality,
            flow=options.flow,
            flow_dtype=options.flow_dtype,
            skeleton=options.skeleton,
            split=options.split,
        )
        videos = find_videos(options.source)
    except (VideoError, ValueError) as error:
        console.print(f"mmdistill prepare: error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    with Progress(console=console) as bar:
        task = bar.add_task(format_count(len(videos), "video"), total=len(videos))

        def progress(result: PrepareResult) -> None:
            bar.advance(task)
            console.print(format_result(result), markup=False, highlight=False, soft_wrap=True)

        results = prepare_all(videos, options.output, settings, workers=options.workers, progress=progress)
    _print_next_commands(console, options.output, results)
    return 1 if any(r.error for r in results) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("prepare", __doc__)
    parser.add_argument("source", type=Path, help="a video file, or a folder with video files")
    parser.add_argument("--output", type=Path, required=True, help="output folder")
    parser.add_argument("--height", type=int, default=224, help="height of the stored frames in px")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality, 1 to 100")
    parser.add_argument("--flow", choices=[*FLOW_METHODS, "none"], default="dis", help="optical flow method")
    parser.add_argument("--flow-dtype", choices=FLOW_DTYPES, default="float16", help="number format of the flow files")
    parser.add_argument(
        "--skeleton",
        choices=["mediapipe", "none"],
        default="none",
        help="keypoint detector; docs/own_data.md describes how to install mediapipe",
    )
    parser.add_argument(
        "--split",
        type=float,
        default=0.4,
        help="vertical position that separates the players, 0 (top) to 1 (bottom): the near player stands below it",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="number of processes; each prepares one video at a time (default: all cores)",
    )
    return parser.parse_args(argv)


def format_result(result: PrepareResult) -> str:
    """The log line of one video."""
    if result.record is None:
        return f"FAILED {result.video}: {result.error}"
    record = result.record
    frames = record["num_frames"]
    height, width = record["stored_size"]
    details = [f"{format_count(frames, 'frame')} at {record['fps']:.2f} fps", f"{height} x {width}"]
    declared = record.get("container_frame_count", 0)
    if declared not in (0, frames):
        details.append(f"the container declares {format_count(declared, 'frame')}")
    if "timestamps_s" in record:
        deviation = record["largest_timestamp_deviation_s"]
        details.append(f"variable frame rate (up to {deviation:.3f} s from the mean rate; see timestamps_s)")
    if record["repeated_frames"]:
        details.append(f"{format_count(len(record['repeated_frames']), 'repeated frame')} (zero flow)")
    if "skeleton_frames" in record:
        found = record["skeleton_frames"]
        details.append(
            f"near player found in {found['near']} of {format_count(frames, 'frame')}, far player in "
            f"{found['far']} of {frames}"
        )
    return f"{result.video}: {', '.join(details)}"


def _print_next_commands(console: Console, output: Path, results: list[PrepareResult]) -> None:
    complete = [r.record for r in results if r.record]
    if not complete:
        return
    sizes = sorted({tuple(record["stored_size"]) for record in complete})
    lines = [f"{len(complete)} of {len(results)} videos are in {output}; see {output}/provenance.json"]
    if len(sizes) > 1:
        lines.append(f"the stored sizes differ ({sizes}): prepare videos of one aspect ratio per output folder")
    lines.append(
        f"to pretrain: mmdistill pretrain --config-name=config_pretrain_tennis modality=rgb "
        f"data_module.target_data_dir={output} data_module.frame_size=[{sizes[0][0]},{sizes[0][1]}]"
    )
    lines.append(
        f"to evaluate with the video as class, add to `mmdistill distill`: data_module.eval_clips=windows "
        "data_module.label=video "
        f"data_module.fewshot_eval_json_path={(output / 'unlabel.json').resolve()}"
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
