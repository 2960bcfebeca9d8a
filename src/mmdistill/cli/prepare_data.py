"""Video files to training data: frames, flow, skeletons and an annotation file in the tennis layout.

    mmdistill prepare VIDEO_OR_DIR --output data/mine [--skeleton mediapipe] [--flow farneback]

Started again after an interruption it only does what is missing. Exit status 1 if any video failed.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmdistill.data.readers.flow_file import FLOW_DTYPES
from mmdistill.prepare.flow import FLOW_METHODS
from mmdistill.prepare.pipeline import Outcome, Settings, prepare_all
from mmdistill.prepare.video import VideoError, find_videos


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, say what was done and what to run next."""
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
        console.print(f"prepare_data: {error}", style="red", markup=False, highlight=False)
        return 2
    with Progress(console=console) as bar:
        task = bar.add_task(f"{len(videos)} videos", total=len(videos))

        def progress(outcome: Outcome) -> None:
            bar.advance(task)
            console.print(_line(outcome), markup=False, highlight=False, soft_wrap=True)

        outcomes = prepare_all(videos, options.output, settings, workers=options.workers, progress=progress)
    _what_next(console, options.output, outcomes)
    return 1 if any(o.error for o in outcomes) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="a video file, or a folder of them")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--height", type=int, default=224, help="of the stored frames, px (default 224)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs (default 95)")
    parser.add_argument("--flow", choices=[*FLOW_METHODS, "none"], default="dis")
    parser.add_argument("--flow-dtype", choices=FLOW_DTYPES, default="float16")
    parser.add_argument("--skeleton", choices=["mediapipe", "none"], default="none", help="mediapipe: the pose extra")
    parser.add_argument(
        "--split", type=float, default=0.4, help="near players have their feet below this height, 0 top, 1 bottom"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="videos at a time")
    return parser.parse_args(argv)


def _line(outcome: Outcome) -> str:
    if outcome.record is None:
        return f"FAILED {outcome.video}: {outcome.error}"
    record = outcome.record
    people = record.get("skeleton_frames")
    found = f", near player in {people['near']}, far in {people['far']}" if people else ""
    height, width = record["stored_size"]
    repeats = len(record["repeated_frames"])
    repeated = f", {repeats} of them repeat the one before (their flow is zero)" if repeats else ""
    size = f"{record['num_frames']} frames at {record['fps']:.2f} fps, {height} x {width}"
    promised = record.get("promised_frames", 0)
    fewer = f", the file promises {promised}" if promised not in (0, record["num_frames"]) else ""
    late = record["largest_timestamp_deviation_s"]
    uneven = (
        f", unevenly spaced (up to {late:.3f} s from this rate; see timestamps_s)" if "timestamps_s" in record else ""
    )
    return f"{outcome.video}: {size}{fewer}{uneven}{repeated}{found}"


def _what_next(console: Console, output: Path, outcomes: list[Outcome]) -> None:
    whole = [o.record for o in outcomes if o.record]
    if not whole:
        return
    sizes = sorted({tuple(record["stored_size"]) for record in whole})
    lines = [f"{len(whole)} of {len(outcomes)} videos are in {output}; all of it is listed in {output}/provenance.json"]
    if len(sizes) > 1:
        lines.append(f"their stored sizes differ ({sizes}): prepare videos of one shape into one folder each")
    lines.append(
        f"python pretrain_main.py --config-name=config_pretrain_tennis modality=rgb "
        f"data_module.target_data_dir={output} data_module.frame_size=[{sizes[0][0]},{sizes[0][1]}]"
    )
    lines.append(
        f"few-shot with the video as class: data_module.eval_clips=windows data_module.label=video "
        f"data_module.fewshot_eval_json_path={(output / 'unlabel.json').resolve()}"
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
