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
from pathlib import Path
from typing import Any

from mmdistill.stages import Stage, StageError, method_stages, run_stages

ROWS = {  # label in the table -> name in fewshot.json
    "distilled student (RGB at test)": "student_rgb",
    "RGB pretrained": "teacher_rgb",
    "random init": "random",
    "distilled from RGB alone": "mmdistill_rgb_only",
    "flow teacher (flow at test)": "teacher_flow",
    "skeleton teacher (skeletons at test)": "teacher_skeleton",
}
DIFFERENCES = (("student_rgb", "teacher_rgb"), ("teacher_rgb", "random"), ("student_rgb", "mmdistill_rgb_only"))


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


def collect(output: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Each seed's fewshot.json."""
    return [json.loads((output / f"seed{seed}" / "test" / "fewshot.json").read_text()) for seed in seeds]


def _setting(result: dict[str, Any], k_shot: int) -> dict[str, Any]:
    return next(s for s in result["settings"] if s["k_shot"] == k_shot)


def _row(result: dict[str, Any], network: str, k_shot: int) -> dict[str, Any]:
    row: dict[str, Any] = _setting(result, k_shot)["rows"][network]
    return row


def _difference(result: dict[str, Any], a: str, b: str, k_shot: int) -> dict[str, Any]:
    """The paired difference a - b on the same episodes."""
    difference: dict[str, Any] = _setting(result, k_shot)["differences"][f"{a} - {b}"]
    return difference


def table(results: list[dict[str, Any]], seeds: list[int]) -> str:
    """The results as Markdown, in percent with 95 % half widths."""
    lines = []
    for k_shot in (1, 5):
        head = " | ".join(f"seed {s}" for s in seeds)
        lines += [f"### 5-way {k_shot}-shot", "", f"| | {head} |", "|---|" + "---|" * len(seeds)]
        for label, name in ROWS.items():
            cells = []
            for result in results:
                row = _row(result, name, k_shot)
                cells.append(f"{100 * row['top1_action_ensemble']:.1f} ± {100 * row['ci95']:.1f}")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        for a, b in DIFFERENCES:
            cells = []
            for result in results:
                d = _difference(result, a, b, k_shot)
                cells.append(f"{100 * d['difference']:+.1f} ± {100 * d['ci95']:.1f}")
            lines.append(f"| *difference {a} − {b}* | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def holds(results: list[dict[str, Any]]) -> bool:
    """Whether student > RGB pretrained > random, with the whole interval above 0, for each seed and shot."""
    return all(
        _difference(result, a, b, k)["low"] > 0 for result in results for k in (1, 5) for a, b in DIFFERENCES[:2]
    )


def main() -> int:
    """Run, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("output/claim"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time; each gets its share of the cores")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    args = parser.parse_args()
    began = time.monotonic()
    try:
        run_stages(claim_stages(args.output.resolve(), args.seeds, tuple(args.overrides)), parallel=args.parallel)
    except StageError as error:
        print(f"reproduce_claim: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("reproduce_claim: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    results = collect(args.output, args.seeds)
    text = table(results, args.seeds)
    verdict = "The claim holds" if holds(results) else "The claim does NOT hold"
    print(f"\n{text}\n{verdict} for seeds {args.seeds} ({(time.monotonic() - began) / 60:.0f} minutes in this call).")
    (args.output / "results.md").write_text(text)
    (args.output / "results.json").write_text(
        json.dumps({"holds": holds(results), "seeds": args.seeds, "results": results})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
