"""Evaluate features few-shot: features of mmdistill or of any other model.

mmdistill evaluate-features features.npz --k-shot 1 5 --classifier logistic centroid --json result.json

An .npz file contains `features` [clips, D] or [clips, views, D], `labels` [clips] (integers or names) and, optionally,
`groups` [clips] (the video of each clip), `matches`, `players`, `hands` and `event_labels` [clips] (of the match, the
player and the stroke; `mmdistill features` writes them). Several files of the same clips are evaluated on the same
episodes. The first file is the scored network.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.cli import imports_without_collections
from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.config import CLASSIFIER_NAMES
from mmdistill.console import record_warnings
from mmdistill.data.clips import DISJOINT
from mmdistill.fewshot.errors import EpisodeError, FewshotError
from mmdistill.files import atomic_write_bytes, encode_json
from mmdistill.plugins import entry_point_names

if TYPE_CHECKING:  # --help answers without torch
    from mmdistill.fewshot.features import Features


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser("evaluate-features", __doc__)
    parser.add_argument("file", nargs="+", type=Path, help="feature file, .npz or .safetensors")
    parser.add_argument("--n-way", type=int, nargs="+", default=[5], help="classes per episode")
    parser.add_argument("--k-shot", type=int, nargs="+", default=[1], help="support clips per class")
    parser.add_argument("--q-sample", type=int, default=15, help="query clips per class")
    parser.add_argument("--episodes", type=int, default=600, help="number of episodes")
    names = (*CLASSIFIER_NAMES, *entry_point_names("mmdistill.classifiers"))
    parser.add_argument(
        "--classifier",
        nargs="+",
        default=["logistic"],
        metavar="NAME",
        help=f"few-shot classifiers: {', '.join(names)}",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the episodes")
    parser.add_argument(
        "--disjoint",
        choices=DISJOINT,
        help="take support and query clips from different videos, matches, or matches and players (default: from any)",
    )
    parser.add_argument(
        "--support-views",
        choices=["each", "first"],
        default="each",
        help="each: one classifier per masked view of the support clips; first: one classifier, on the first view",
    )
    parser.add_argument("--probe", action="store_true", help="also run a linear probe and k-NN on the full label set")
    parser.add_argument("--report-card", action="store_true", help="also score each element of the labels")
    parser.add_argument(
        "--shortcut-audit", action="store_true", help="also score episodes disjoint by video, match and player"
    )
    parser.add_argument("--workers", type=int, help="processes of the logistic regression (default: all processors)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the results to this file (default: none)")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write fewshot.json and report.html to this folder (default: none)"
    )
    return parser.parse_args(argv)


def make_names_distinct(found: list["Features"], files: list[Path]) -> list["Features"]:
    """Append the file's name to the network of features that have the same network and input mode."""
    keys = [(f.network, f.input_mode) for f in found]
    return [
        f if keys.count(key) == 1 else replace(f, info={**f.info, "network": f"{f.network} ({file.stem})"})
        for f, key, file in zip(found, keys, files, strict=True)
    ]


def name_options(message: str) -> str:
    """The message with the options of this command in place of the config keys of `mmdistill evaluate`."""
    message = re.sub(r" \(set data_module\.[^()]*\)|, or merge labels \(label_fields\)$", "", message)
    message = re.sub(r"(?:data_module\.)?\b(n_way|disjoint)=(\w+)", r"--\1 \2", message)
    message = re.sub(r"(?<=lower )(\w_\w+) or (\w_\w+)", r"--\1 or --\2", message)
    message = message.replace("unset disjoint", "omit --disjoint")
    return re.sub(r"--(\w)_(\w+)", r"--\1-\2", message)


@report_errors("evaluate-features")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0, or 2 if the features or options are invalid or the output cannot be written."""
    args = parse_arguments(argv)
    with record_warnings() as warnings:
        return _evaluate(args, warnings)


def _evaluate(args: argparse.Namespace, warnings: Callable[[], list[str]]) -> int:
    """Evaluate the files; `warnings` returns the warnings that were logged so far."""
    with imports_without_collections():
        from mmdistill.evaluation.report.write import print_tables, to_json, write_report
        from mmdistill.fewshot.features import load_features
        from mmdistill.fewshot.novel_classes import check_novel_features
        from mmdistill.fewshot.protocol import Protocol, run_protocol

    protocol = Protocol(
        n_way=args.n_way,
        k_shot=args.k_shot,
        q_sample=args.q_sample,
        episodes=args.episodes,
        seed=args.seed,
        classifiers=args.classifier,
        disjoint=args.disjoint,
        support_views=args.support_views,
        probe=args.probe,
        report_card=args.report_card,
        shortcut_audit=args.shortcut_audit,
    )
    found = make_names_distinct([load_features(file) for file in args.file], args.file)
    if (args.disjoint or args.probe or args.shortcut_audit) and found[0].info.get("has_groups") is False:
        raise FewshotError(
            f"{args.file[0]}: no array `groups`, which --disjoint and --probe need, and --shortcut-audit; add it, or "
            "omit these options"
        )
    try:
        lines = protocol.check(found[0].labels.tolist(), found[0].groups, found[0].classes, found[0].sources)
    except EpisodeError as error:
        raise EpisodeError(name_options(str(error))) from error
    for features in found:
        check_novel_features(features)
    for line in lines:
        print(line, file=sys.stderr)
    results = run_protocol(found, protocol, workers=args.workers)
    print_tables(results)
    extra = {"files": [str(file) for file in args.file]}
    if args.json:
        atomic_write_bytes(args.json, encode_json(to_json(results, extra=extra), allow_nan=False))
    if args.report:
        print(f"report: {write_report(results, args.report, extra=extra, caveats=warnings())}")
    return 0
