"""Table of few-shot results: one column per training seed, one row per network and per paired difference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = {  # label in the table -> name in fewshot.json
    "distilled student (RGB at test time)": "student_rgb",
    "RGB pretrained": "teacher_rgb",
    "random initialization": "random",
    "distilled from RGB alone": "mmdistill_rgb_only",
    "flow teacher (flow at test time)": "teacher_flow",
    "skeleton teacher (skeletons at test time)": "teacher_skeleton",
}
DIFFERENCES = (("student_rgb", "teacher_rgb"), ("teacher_rgb", "random"), ("student_rgb", "mmdistill_rgb_only"))


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
