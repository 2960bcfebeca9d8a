"""Does distillation help? Three seeds on the demo data, 5-way 1-shot and 5-shot, with paired differences.

For each seed: pretrain rgb, flow and skeleton, distil all three teachers and the RGB teacher alone, then score on the
same episodes: the distilled student, the RGB-pretrained encoder it started from, an untrained encoder, the flow and
skeleton teachers, and the student of RGB alone. Resumable: a second call does only what is missing. The table goes to
``results.md`` and ``results.json`` in the output folder, whatever it says.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mmdistill.workflows.pipeline import Stage, StageError, method_stages, run_stages
from mmdistill.workflows.results_table import claim_table, holds, read_results


def claim_stages(output: Path, seeds: list[int], extra: tuple[str, ...]) -> list[Stage]:
    """The runs of all seeds."""
    stages: list[Stage] = []
    for seed in seeds:
        stages += method_stages(
            output / f"seed{seed}",
            seed=seed,
            common=("num_workers=0", *extra),
            test=("data_module.episodes=1000", "data_module.k_shot=[1,5]"),
            rgb_only=True,
            prefix=f"seed {seed}: ",
        )
    return stages


def main(argv: Sequence[str] | None = None) -> int:
    """Run, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/claim"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time; each gets its share of the cores")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    args = parser.parse_args(argv)
    began = time.monotonic()
    try:
        run_stages(claim_stages(args.output.resolve(), args.seeds, tuple(args.overrides)), parallel=args.parallel)
    except StageError as error:
        print(f"reproduce_claim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reproduce_claim: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    results = [read_results(args.output / f"seed{seed}" / "test") for seed in args.seeds]
    text = claim_table(results, args.seeds)
    verdict = "The claim holds" if holds(results) else "The claim does NOT hold"
    print(f"\n{text}\n{verdict} for seeds {args.seeds} ({(time.monotonic() - began) / 60:.0f} minutes in this call).")
    (args.output / "results.md").write_text(text)
    (args.output / "results.json").write_text(
        json.dumps({"holds": holds(results), "seeds": args.seeds, "results": results})
    )
    return 0
