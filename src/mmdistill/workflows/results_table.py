"""Table of few-shot results: one column per training seed, one row per network and per paired difference."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROWS = {  # label in the table -> name in fewshot.json
    "distilled student (RGB at test time)": "student_rgb",
    "RGB pretrained": "teacher_rgb",
    "random initialization": "random",
    "distilled from RGB alone": "mmdistill_rgb",
    "distilled from RGB and flow": "mmdistill_rgb_flow",
    "distilled from RGB and skeleton": "mmdistill_rgb_skeleton",
    "flow teacher (flow at test time)": "teacher_flow",
    "untrained flow encoder": "random_flow",
    "skeleton teacher (skeletons at test time)": "teacher_skeleton",
    "untrained skeleton encoder": "random_skeleton",
}
SUBSETS = (("rgb",), ("rgb", "flow"), ("rgb", "skeleton"))  # teachers of the students of the rows "distilled from"
DIFFERENCES = (
    ("student_rgb", "teacher_rgb"),
    ("teacher_rgb", "random"),
    ("student_rgb", "mmdistill_rgb"),
    ("mmdistill_rgb_flow", "mmdistill_rgb"),
    ("student_rgb", "mmdistill_rgb_skeleton"),
    ("teacher_flow", "random_flow"),
    ("teacher_skeleton", "random_skeleton"),
)


def read_results(run: Path) -> dict[str, Any]:
    """Read ``fewshot.json`` of the run folder of an evaluation."""
    results: dict[str, Any] = json.loads((run / "fewshot.json").read_bytes())
    return results


def _setting(result: dict[str, Any], k_shot: int) -> dict[str, Any]:
    return next(s for s in result["settings"] if s["k_shot"] == k_shot)


def render_results_table(
    results: Sequence[dict[str, Any]], seeds: Sequence[int], *, k_shots: Sequence[int] = (1, 5)
) -> str:
    """Markdown table in percent, ± half width of the 95 % interval over episodes. Missing networks are omitted."""
    lines: list[str] = []
    for k_shot in k_shots:
        settings = [_setting(result, k_shot) for result in results]
        header = " | ".join(f"seed {s}" for s in seeds)
        lines += [f"### {settings[0]['n_way']}-way {k_shot}-shot", "", f"| | {header} |", "|---|" + "---|" * len(seeds)]
        for label, name in ROWS.items():
            rows = [s["rows"].get(name) for s in settings]
            if all(rows):
                cells = [f"{100 * r['top1_action_ensemble']:.1f} ± {100 * r['ci95']:.1f}" for r in rows]
                lines.append(f"| {label} | " + " | ".join(cells) + " |")
        for a, b in DIFFERENCES:
            differences = [s["differences"].get(f"{a} - {b}") for s in settings]
            if all(differences):
                cells = [f"{100 * d['difference']:+.1f} ± {100 * d['ci95']:.1f}" for d in differences]
                lines.append(f"| *difference {a} − {b}* | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def student_beats_baselines(results: Sequence[dict[str, Any]], *, k_shots: Sequence[int] = (1, 5)) -> bool:
    """Whether student > RGB pretrained > random for each seed and shot, with every paired 95 % interval above 0."""
    return all(
        _setting(result, k)["differences"][f"{a} - {b}"]["low"] > 0
        for result in results
        for k in k_shots
        for a, b in DIFFERENCES[:2]
    )


def describe_order(results: Sequence[dict[str, Any]]) -> str:
    """Whether the networks have the expected order, as the start of a sentence."""
    confirmed = "confirmed" if student_beats_baselines(results) else "NOT confirmed"
    return f"Expected order, student > RGB pretrained > random initialization: {confirmed}"


def plot_results(results: Mapping[float, Sequence[dict[str, Any]]], path: Path, *, k_shot: int = 5) -> None:
    """Plot accuracy in percent against nuisance: a line through the means over seeds, and a point per seed.

    Args:
        results: nuisance of the demo data -> content of ``fewshot.json`` of each seed.
        path: file of the image.
        k_shot: the plotted setting.
    """
    from matplotlib.figure import Figure  # which --help must not import

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (label, name) in enumerate(ROWS.items()):
        rows = {n: [_setting(r, k_shot)["rows"].get(name) for r in runs] for n, runs in results.items()}
        points = {n: [100 * row["top1_action_ensemble"] for row in found] for n, found in rows.items() if all(found)}
        if points:
            axes.plot(list(points), [sum(v) / len(v) for v in points.values()], color=f"C{i}", label=label)
            seeds = [(n, value) for n, values in points.items() for value in values]
            axes.plot(*zip(*seeds, strict=True), ".", color=f"C{i}")
    n_way = _setting(next(iter(results.values()))[0], k_shot)["n_way"]
    axes.axhline(100 / n_way, color="0.6", linestyle=":", label="chance")
    axes.set_xlabel("nuisance of the demo data (data_module.demo_nuisance)")
    axes.set_ylabel(f"{n_way}-way {k_shot}-shot accuracy in percent")
    axes.set_xticks(list(results))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
