"""Spot labeled strokes: train a small head on a few labeled rallies, and find the events of the others.

mmdistill spot PATH/TO/last.ckpt
mmdistill spot PATH/TO/last.ckpt --shots 5 --draws 20 --output output/spotting_5
mmdistill spot PATH --rallies VIDEO_1 VIDEO_2 --config-name config_mmdistill_tennis data_module.target_data_dir=DIR

The rallies are those of data_module.fewshot_eval_json_path. The networks are eval_component and baselines. Two files
are written: spotting.json has all metrics, and predictions.json the events that the scored network finds in the first
draw, as F3Set annotations. Further arguments are Hydra overrides.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import add_evaluation_config, load_evaluation_config, make_parser, report_errors
from mmdistill.config import DistillConfig
from mmdistill.files import atomic_write_bytes, encode_json


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("spot", __doc__)
    parser.add_argument("checkpoint", help="checkpoint file or directory")
    parser.add_argument("--shots", type=int, default=10, help="labeled rallies per draw")
    parser.add_argument(
        "--draws", type=int, default=10, help="draws of labeled rallies, over which results are averaged"
    )
    parser.add_argument(
        "--rallies", nargs="+", metavar="VIDEO", help="the labeled rallies, for a single draw (default: random)"
    )
    parser.add_argument("--stride", type=int, default=3, help="frames between the windows that are encoded")
    parser.add_argument("--output", type=Path, default=Path("output/spotting"), help="folder of the results")
    add_evaluation_config(parser)
    return parser.parse_intermixed_args(argv)


@report_errors("spot", schema=DistillConfig)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the arguments, the checkpoint or the data are invalid."""
    args = parse_arguments(argv)
    config = load_evaluation_config(args)
    from mmdistill.evaluation.spotting import SpottingProtocol, predictions_json, print_results, results_json, spot

    named = tuple(dict.fromkeys(args.rallies)) if args.rallies else None
    protocol = SpottingProtocol(args.shots, args.draws, config.seed, named)
    results = spot(config, args.checkpoint, protocol, stride=args.stride)
    print_results(results)
    for name, content in (("spotting", results_json(results)), ("predictions", predictions_json(results))):
        path = args.output / f"{name}.json"
        atomic_write_bytes(path, encode_json(content))
        print(f"{name}: {path}")
    return 0
