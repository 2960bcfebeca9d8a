"""Test whether distillation helps: several seeds on the demo data, 5-way 1-shot and 5-shot, paired differences.

For each seed: pretrain rgb, flow and skeleton; distill from all three teachers and from the RGB teacher alone; evaluate
on the same episodes the student, the RGB encoder it started from, an untrained encoder, the flow and skeleton teachers,
and the student distilled from RGB alone. A second call runs only the missing stages. The table is written to
``results.md`` and ``results.json`` in the output folder.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.files import atomic_write_bytes
from mmdistill.workflows.results_table import (
    describe_order,
    read_results,
    render_results_table,
    student_beats_baselines,
)


@report_errors("results-table", continues=True)
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
    from mmdistill.workflows.pipeline import method_stages, run_stages  # torch, which --help must not import

    start_time = time.monotonic()
    stages = [
        stage
        for seed in args.seeds
        for stage in method_stages(
            args.output.resolve() / f"seed{seed}",
            seed=seed,
            common=("num_workers=0", *args.overrides),
            test=("data_module.episodes=1000", "data_module.k_shot=[1,5]"),
            rgb_only=True,
            prefix=f"seed {seed}: ",
        )
    ]
    for stage in {stage.verb: stage for stage in stages}.values():
        stage.config()  # a wrong override ends the command before the first run
    run_stages(stages, parallel=args.parallel)
    results = [read_results(args.output / f"seed{seed}" / "test") for seed in args.seeds]
    text = render_results_table(results, args.seeds)
    minutes = (time.monotonic() - start_time) / 60
    print(f"\n{text}\n{describe_order(results)} for seeds {args.seeds} ({minutes:.0f} min).")
    content = {"student_beats_baselines": student_beats_baselines(results), "seeds": args.seeds, "results": results}
    atomic_write_bytes(args.output / "results.md", text.encode())
    atomic_write_bytes(args.output / "results.json", json.dumps(content).encode())
    return 0
