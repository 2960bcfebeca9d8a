"""Propose labels for the strokes of a new video, with a few labeled strokes as examples.

mmdistill label NEW.mp4 --checkpoint last.ckpt --examples examples.json
mmdistill label NEW.mp4 --checkpoint last.ckpt --examples examples.csv --videos DIR --output output/label/NEW
mmdistill label NEW.mp4 --checkpoint last.ckpt --examples old.json --examples corrected.csv
mmdistill label FRAMES --checkpoint last.ckpt --examples val.json --complete

The video is a file or a folder of numbered JPEG files. Only its RGB frames are read. The examples are F3Set JSON, or
CSV with the columns video, frame and label. Strokes of several files are joined. A video of the examples is NEW.mp4
itself, or the file or folder of its name in --videos, next to the examples or next to NEW.mp4. Three files are written:
strokes.json (F3Set annotations with scores), strokes.csv (which can be corrected and given as a further --examples),
and strokes.html (timeline, film strips, labels with probabilities, nearest examples; uncertain strokes first).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.errors import InputError, format_count


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("label", __doc__)
    parser.add_argument("video", type=Path, help="video file, or folder of numbered JPEG files")
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint with an RGB encoder, such as last.ckpt of a distillation"
    )
    parser.add_argument(
        "--examples",
        required=True,
        action="append",
        type=Path,
        help="labeled strokes: F3Set JSON, or CSV; several files: repeat the option",
    )
    parser.add_argument(
        "--videos",
        default=[],
        action="append",
        type=Path,
        help="further folder with the videos of the examples; several folders: repeat the option (default: none)",
    )
    parser.add_argument(
        "--complete",
        action="store_true",
        help="every stroke of the example rallies is labeled: all their other frames are examples without a stroke "
        "(default: only the frames within half a second of a labeled stroke)",
    )
    parser.add_argument(
        "--fps", type=float, help="frame rate of a folder of frames, for the times (default: that of the examples)"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest probability of a proposed stroke")
    parser.add_argument("--stride", type=int, default=3, help="frames between the windows that are encoded")
    parser.add_argument("--seed", type=int, default=0, help="seed of the network that proposes strokes")
    parser.add_argument("--output", type=Path, help="folder of the results (default: output/label/NAME)")
    args = parser.parse_args(argv)
    if not 0 < args.threshold < 1:
        parser.error(f"--threshold {args.threshold} must lie between 0 and 1")
    if args.fps is not None and args.fps <= 0:
        parser.error(f"--fps {args.fps} must be positive")
    return args


@report_errors("label")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the arguments, the checkpoint or a video are invalid."""
    args = parse_arguments(argv)
    for path in (args.video, *args.examples, *args.videos):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
    from mmdistill.data.annotations.base import UNKNOWN_FPS  # the following import torch, which --help must not
    from mmdistill.data.annotations.examples import load_examples
    from mmdistill.distributed.device import resolve_precision
    from mmdistill.distributed.process import start_process
    from mmdistill.evaluation.labeled_frames import video_name
    from mmdistill.evaluation.labeling import LabelingOptions, label_video
    from mmdistill.evaluation.report.label_page import write_labels
    from mmdistill.evaluation.video_features import load_video_encoder

    rallies = load_examples(*args.examples)
    device = start_process(accelerator="auto", seed=args.seed).device
    precision = resolve_precision("auto", device)
    encoder = load_video_encoder(args.checkpoint, stride=args.stride, device=device, precision=precision)
    folders = dict.fromkeys([*args.videos, *(path.parent for path in args.examples), args.video.parent])
    options = LabelingOptions(tuple(folders), args.complete, args.threshold, args.fps or UNKNOWN_FPS, args.seed)
    video = label_video(args.video, encoder, rallies, options)
    paths = write_labels(video, args.output or Path("output/label") / video_name(args.video))
    num_proposed = sum(not stroke.is_example for stroke in video.strokes)
    examples, frames = format_count(len(video.examples), "example"), format_count(video.num_frames, "frame")
    print(f"{video.name}: {format_count(num_proposed, 'proposed stroke')} in {frames}, with {examples}")
    for path in paths:
        print(path)
    return 0
