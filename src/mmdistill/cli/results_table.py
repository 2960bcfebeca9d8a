"""Test whether distillation helps: several seeds on the demo data, 5-way 1-shot and 5-shot, paired differences.

For each seed: pretrain rgb, flow and skeleton; distill from all three teachers and from the RGB teacher alone; evaluate
on the same episodes the student, the RGB encoder it started from, an untrained encoder, the flow and skeleton teachers,
and the student distilled from RGB alone. A second call runs only the missing stages. The table is written to
``results.md`` and ``results.json`` in the output folder.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmdistill.cli.parser import make_parser
from mmdistill.workflows.results_table import read_results, render_results_table, student_beats_baselines

if TYPE_CHECKING:
    from mmdistill.workflows.pipeline import Stage


def seed_stages(output: Path, seeds: list[int], overrides: tuple[str, ...]) -> "list[Stage]":
    """The stages of all seeds."""
    from mmdistill.workflows.pipeline import method_stages  # imports torch, which --help must not

    stages: list[Stage] = []
    for seed in seeds:
        stages += method_stages(
            output / f"seed{seed}",
            seed=seed,
            common=("num_workers=0", *overrides),
            test=("data_module.episodes=1000", "data_module.k_shot=[1,5]"),
            rgb_only=True,
            prefix=f"seed {seed}: ",
        )
    return stages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, then print and write the table. 0 if done, 1 if a stage failed."""
    parser = make_parser("results-table", __doc__)
    parser.add_argument("--output", type=Path, default=Path("output/claim"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument(
        "--parallel", type=int, default=2, help="simultaneous runs; the CPU cores are divided among them"
    )
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    args = parser.parse_args(argv)
    from mmdistill.workflows.pipeline import StageError, run_stages

    start_time = time.monotonic()
    try:
        run_stages(seed_stages(args.output.resolve(), args.seeds, tuple(args.overrides)), parallel=args.parallel)
    except StageError as error:
        print(f"mmdistill results-table: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmdistill results-table: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    results = [read_results(args.output / f"seed{seed}" / "test") for seed in args.seeds]
    text = render_results_table(results, args.seeds)
    confirmed = student_beats_baselines(results)
    minutes = (time.monotonic() - start_time) / 60
    print(
        f"\n{text}\nExpected order, student > RGB pretrained > random initialization, for seeds {args.seeds}: ", end=""
    )
    print(f"{'confirmed' if confirmed else 'NOT confirmed'} ({minutes:.0f} min).")
    (args.output / "results.md").write_text(text)
    (args.output / "results.json").write_text(
        json.dumps({"student_beats_baselines": confirmed, "seeds": args.seeds, "results": results})
    )
    return 0
