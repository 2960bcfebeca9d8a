"""Write one HTML page with the clips of a dataset by label, video and frame.

mmdistill browse dataset=demo
mmdistill browse dataset=demo --evaluation output/demo/test/fewshot.json --output browse.html
mmdistill browse --split unlabel --modalities rgb flow dataset=NAME data_module.target_data_dir=DIR

The page contains a search for labels, videos and frames, the label statistics (the possible N-way K-shot episodes), and
pictures of clips as the model sees them, with flow, joints and mask. --evaluation adds the errors of an evaluation:
query clips, nearest support clips and differing elements of their labels. The page has at most 10 MB and needs no
network. Further arguments are Hydra overrides.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import add_evaluation_config, load_evaluation_config, make_parser, report_errors
from mmdistill.config import ConfigError, DistillConfig
from mmdistill.errors import format_size
from mmdistill.files import atomic_write_bytes
from mmdistill.modalities import modality_names


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("browse", __doc__)
    parser.add_argument("--output", type=Path, default=Path("output/browse.html"), help="page to write")
    parser.add_argument(
        "--split",
        choices=["unlabel", "eval"],
        default="eval",
        help="annotation file of the dataset config: training or evaluation",
    )
    parser.add_argument(
        "--modalities", nargs="+", choices=modality_names(), help="modalities to draw (default: all of the dataset)"
    )
    parser.add_argument(
        "--clips", type=int, default=200, help="largest number of clips with a picture; fewer if they exceed 6 MB"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FEWSHOT_JSON",
        help="fewshot.json of `mmdistill evaluate`, whose errors are shown (default: none)",
    )
    parser.add_argument("--errors", type=int, default=24, help="largest number of errors")
    add_evaluation_config(parser)
    return parser.parse_intermixed_args(argv)


@report_errors("browse", schema=DistillConfig)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the arguments, the data or the evaluation are invalid."""
    args = parse_arguments(argv)
    for name in ("clips", "errors"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name} {getattr(args, name)} must be at least 0")
    config = load_evaluation_config(args)
    from mmdistill.evaluation.browse import BrowseOptions, BrowsePage  # imports torch, which --help must not

    modalities = tuple(args.modalities) if args.modalities else None
    options = BrowseOptions(args.split, modalities, args.clips, args.evaluation, args.errors)
    text, lines = BrowsePage(config, options).render()
    content = text.encode()
    atomic_write_bytes(args.output, content)
    print("\n".join([*lines, f"page: {args.output} ({format_size(len(content))})"]))
    return 0
