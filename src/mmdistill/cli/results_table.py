"""Test whether distillation helps: several seeds on the demo data, 5-way 1-shot and 5-shot, paired differences.

For each seed: pretrain rgb, flow and skeleton; distill from all three teachers, from the RGB teacher alone, and from
the RGB teacher and one other; evaluate on the same episodes all students, the RGB encoder they started from, the flow
and skeleton teachers, and an untrained encoder of each modality. With --nuisance, repeat this on demo data of each
given nuisance, with the subsets of teachers for the first one only. A second call runs only the missing stages. The
tables are written to ``results.md`` and ``results.json`` in the output folder, and with several nuisances a plot to
``results.png``.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from mmdistill.cli.parser import make_parser, report_errors
from mmdistill.files import atomic_write_bytes
from mmdistill.workflows.results_table import (
    SUBSETS,
    describe_order,
    plot_results,
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
    parser.add_argument(
        "--nuisance", type=float, nargs="+", help="values of data_module.demo_nuisance; default: that of the config"
    )
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for every run")
    args = parser.parse_args(argv)
    # These import torch, which --help must not.
    from mmdistill.workflows.pipeline import BASELINES, Stage, method_stages, run_stages

    start_time = time.monotonic()
    stages: list[Stage] = []
    tests: dict[float | None, list[Path]] = {}  # nuisance -> folders of the evaluations, by seed
    nuisances = args.nuisance or [None]
    for nuisance in nuisances:
        output, prefix, common = args.output.resolve(), "", ("num_workers=0", *args.overrides)
        if nuisance is not None:
            output, prefix = output / f"nuisance_{nuisance:g}", f"nuisance {nuisance:g}, "
            common += (f"data_module.demo_nuisance={nuisance}", f"data_module.target_data_dir={output / 'data'}")
        for seed in args.seeds:
            stages += method_stages(
                output / f"seed{seed}",
                seed=seed,
                common=common,
                test=("data_module.episodes=1000", "data_module.k_shot=[1,5]", "data_module.input_modes=configured"),
                subsets=SUBSETS if nuisance == nuisances[0] else (),
                baselines=(*BASELINES, "random_flow", "random_skeleton"),
                prefix=f"{prefix}seed {seed}: ",
            )
            tests.setdefault(nuisance, []).append(stages[-1].run_dir)
    for stage in {stage.verb: stage for stage in stages}.values():
        stage.config()  # a wrong override ends the command before the first run
    run_stages(stages, parallel=args.parallel)
    results = {nuisance: [read_results(folder) for folder in folders] for nuisance, folders in tests.items()}
    text = ""
    for nuisance, found in results.items():
        title = "" if nuisance is None else f"## Nuisance {nuisance:g}\n\n"
        text += f"{title}{render_results_table(found, args.seeds)}\n{describe_order(found)} for seeds {args.seeds}.\n\n"
    print(f"\n{text}{(time.monotonic() - start_time) / 60:.0f} min")
    everything = [
        {"nuisance": nuisance, "seed": seed, **result}
        for nuisance, found in results.items()
        for seed, result in zip(args.seeds, found, strict=True)
    ]
    content = {"student_beats_baselines": student_beats_baselines(everything), "results": everything}
    atomic_write_bytes(args.output / "results.md", text.encode())
    atomic_write_bytes(args.output / "results.json", json.dumps(content).encode())
    if len(results) > 1:
        plot_results({n: found for n, found in results.items() if n is not None}, args.output / "results.png")
    return 0
