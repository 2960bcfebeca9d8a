"""The main job on the demo data: pretrain rgb, flow and skeleton, distil, evaluate. `make demo` calls this.

A second call does only what is missing. ``--short`` takes one epoch of everything, to see that it runs.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmdistill.workflows.pipeline import StageError, method_stages, run_stages
from mmdistill.workflows.results_table import claim_table, holds, read_results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, say where the report lies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the runs")
    parser.add_argument("--short", action="store_true", help="one epoch each: shows that it runs, not that it learns")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    short = ("trainer.epochs=1", "trainer.warmup_epochs=0", "data_module.window_stride=8")
    stages = method_stages(
        args.output.resolve(),
        seed=args.seed,
        pretrain=short if args.short else (),
        distill=short if args.short else (),
        test=(f"data_module.episodes={100 if args.short else 600}", "data_module.k_shot=[1,5]"),
    )
    try:
        run_stages(stages)
    except StageError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: stopped; `make demo` goes on from here", file=sys.stderr)
        return 130
    report = args.output / "test"
    results = read_results(report)
    print("\n" + claim_table([results], [args.seed]))
    verdict = "holds" if holds([results]) else "does NOT hold"
    print(f"student > RGB pretrained > random init {verdict} in this {'one-epoch ' if args.short else ''}run")
    print(f"\nreport: {report / 'report.html'}\nnumbers: {report / 'fewshot.json'}")
    return 0
