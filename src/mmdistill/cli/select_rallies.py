"""Select the rallies to label next: the training rallies that differ most from each other and from the labeled ones.

mmdistill select-rallies PATH/TO/last.ckpt --budget 10
mmdistill select-rallies PATH/TO/last.ckpt --budget 10 --labeled examples.json
mmdistill select-rallies PATH/TO/last.ckpt --budget 10 --curve

The candidates are the rallies of data_module.unlabel_json_path. Rallies of fewshot_eval_json_path are never
selected. selected.json has the selected rallies in their order, as F3Set annotations without events: add the events,
and give the file to `mmdistill label` or `mmdistill spot`. --curve divides the evaluation rallies into two halves and
shows how well events are spotted in one half with 1, 2, 4 ... labeled rallies of the other half, selected in this way
or at random: curve.json and curve.png. Further arguments are Hydra overrides.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.checkpoint.errors import ComponentError, name_setting
from mmdistill.cli.parser import add_evaluation_config, load_evaluation_config, make_parser, report_errors
from mmdistill.config import DistillConfig
from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import load_f3set, to_json
from mmdistill.errors import format_count
from mmdistill.files import atomic_write_bytes, encode_json

if TYPE_CHECKING:
    from mmdistill.evaluation.rally_selection import RallyFeatures


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("select-rallies", __doc__)
    parser.add_argument("checkpoint", help="checkpoint file or directory")
    parser.add_argument("--budget", type=int, default=10, help="number of rallies to select")
    parser.add_argument(
        "--labeled",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="F3Set JSON file of rallies with labels; may be repeated (default: none)",
    )
    parser.add_argument("--component", help="network of the checkpoint (default: the student, or the only encoder)")
    parser.add_argument("--stride", type=int, default=3, help="frames between the windows that are encoded")
    parser.add_argument("--features", type=Path, help="folder of the features per frame (default: OUTPUT/features)")
    parser.add_argument("--curve", action="store_true", help="compare with a random selection")
    parser.add_argument("--draws", type=int, default=10, help="with --curve: divisions into two halves")
    parser.add_argument("--output", type=Path, default=Path("output/selected_rallies"), help="folder of the results")
    add_evaluation_config(parser)
    return parser.parse_intermixed_args(argv)


@report_errors("select-rallies", schema=DistillConfig)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the arguments, the checkpoint or the data are invalid."""
    args = parse_arguments(argv)
    config = load_evaluation_config(args)
    from mmdistill.evaluation.rally_selection import RallyFeatures, unlabeled_rallies
    from mmdistill.fewshot.rally_selection import select_rallies

    labeled = [rally for path in args.labeled for rally in load_f3set(path)]
    candidates = unlabeled_rallies(config, labeled)
    with name_setting("--component", ComponentError):
        source = RallyFeatures(
            config,
            args.checkpoint,
            component=args.component,
            folder=args.features or args.output / "features",
            stride=args.stride,
        )
    features = source.read([*labeled, *candidates])
    selected = select_rallies(features, args.budget, labeled=[r.video for r in labeled if r.video in features])
    by_name = {rally.video: rally for rally in candidates}
    _write_json(args.output / "selected.json", to_json([replace(by_name[video], events=()) for video in selected]))
    print(f"{format_count(len(selected), 'rally')} of {len(candidates)} to label: {args.output / 'selected.json'}")
    for video in selected:
        print(f"  {video}")
    if args.curve:
        _write_curve(args, config, source)
    return 0


def _write_json(path: Path, content: object) -> None:
    atomic_write_bytes(path, encode_json(content))


def _write_curve(args: argparse.Namespace, config: DistillConfig, source: "RallyFeatures") -> None:
    from mmdistill.evaluation.rally_selection import label_curve, plot_curve, print_curve, read_evaluation_rallies

    rallies: list[Rally] = read_evaluation_rallies(config)
    curve = label_curve(source.read(rallies), rallies, draws=args.draws, seed=config.seed)
    print_curve(curve)
    _write_json(args.output / "curve.json", curve.to_json())
    plot_curve(curve.rows(), args.output / "curve.png")
    print(f"curve: {args.output / 'curve.png'}")
