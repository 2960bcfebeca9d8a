"""Run the whole method on generated data: pretrain rgb, flow and skeleton, distill, evaluate. `make demo` calls this.

The pretrainings run in parallel. At the end the student proposes labels for the strokes of one rally, with other
rallies as examples. A second call runs only the missing stages.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmdistill.cli import label
from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.config import DistillConfig
from mmdistill.config.compose import load_config
from mmdistill.data.annotations.f3set import select_fields, to_json
from mmdistill.data.cores import available_cores
from mmdistill.files import atomic_write_bytes
from mmdistill.workflows.results_table import describe_order, read_results, render_results_table

NUM_EXAMPLE_RALLIES = 10  # for the labels of another rally


@report_errors("demo", continues=True)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages, then print the results and the paths of the report. 0 if done, 1 if a stage failed."""
    parser = make_parser("demo", __doc__)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder of the runs")
    parser.add_argument(
        "--short", action="store_true", help="one epoch per stage: checks that the pipeline runs, not that it learns"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all stages")
    args = parser.parse_args(argv)
    from mmdistill.distill.ledger import ledger_lines  # torch, which --help must not import
    from mmdistill.modalities import BUILTIN_MODALITIES
    from mmdistill.workflows.pipeline import method_stages, run_stages

    short = ("trainer.epochs=1", "trainer.warmup_epochs=0", "data_module.window_stride=8")
    stages = method_stages(
        args.output.resolve(),
        seed=args.seed,
        train=short if args.short else (),
        test=(
            f"data_module.episodes={100 if args.short else 400}",
            "data_module.k_shot=[1,5]",
            "data_module.input_modes=configured",
        ),
    )
    run_stages(stages, parallel=min(len(BUILTIN_MODALITIES), available_cores()))
    report = args.output / "test"
    results = read_results(report)
    print("\n" + render_results_table([results], [args.seed]))
    print("The table shows few-shot accuracy in percent, with 95 % confidence intervals over the episodes.")
    print(f"{describe_order([results])} in this run.")
    if "ledger" in results:  # not in a run of an earlier commit
        print("\n".join(["", *ledger_lines(results["ledger"])]))
    if args.short:
        print("One epoch per stage is too short to learn; this run only checks that the pipeline works.")
    print(f"\nreport: {report / 'report.html'}\nnumbers: {report / 'fewshot.json'}\n", flush=True)
    return label_rally(args.output)


def label_rally(output: Path) -> int:
    """Propose labels for the first evaluation rally, with the next ones as examples. Returns the exit status."""
    from mmdistill.builders import load_rallies, resolve_annotation_path, resolve_data_path

    data = load_config(DistillConfig, "config_mmdistill", ["train=False", "test=False"]).data_module
    frames = resolve_data_path(data, data.modalities["rgb"].dir, "modalities.rgb.dir")
    rally, *others = load_rallies(data, resolve_annotation_path(data, training=False))[: NUM_EXAMPLE_RALLIES + 1]
    labeled = [
        replace(r, events=tuple(replace(e, label=select_fields(e.label, data.label_fields)) for e in r.events))
        for r in others
    ]
    examples = output / "label" / "examples.json"
    atomic_write_bytes(examples, json.dumps(to_json(labeled), indent=1).encode())
    student = output / "mmdistill" / "checkpoints" / "last.ckpt"
    arguments = [str(frames / rally.video), "--checkpoint", str(student), "--examples", str(examples), "--complete"]
    arguments += ["--fps", f"{rally.fps:g}", "--output", str(examples.parent)]
    print(f"mmdistill label {' '.join(arguments)}", flush=True)
    return label.main(arguments)
