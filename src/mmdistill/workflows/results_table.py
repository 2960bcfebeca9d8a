"""The table that answers whether distillation helps: one column per training seed, one for each row and difference."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROWS = {  # label in the table -> name in fewshot.json
    "distilled student (RGB at test)": "student_rgb",
    "RGB pretrained": "teacher_rgb",
    "random init": "random",
    "distilled from RGB alone": "mmdistill_rgb_only",
    "flow teacher (flow at test)": "teacher_flow",
    "skeleton teacher (skeletons at test)": "teacher_skeleton",
}
DIFFERENCES = (("student_rgb", "teacher_rgb"), ("teacher_rgb", "random"), ("student_rgb", "mmdistill_rgb_only"))


def read_results(run: Path) -> dict[str, Any]:
    """The ``fewshot.json`` of an evaluation's run folder."""
    results: dict[str, Any] = json.loads((run / "fewshot.json").read_text())
    return results


def _setting(result: dict[str, Any], k_shot: int) -> dict[str, Any]:
    return next(s for s in result["settings"] if s["k_shot"] == k_shot)


def claim_table(results: Sequence[dict[str, Any]], seeds: Sequence[int], *, k_shots: Sequence[int] = (1, 5)) -> str:
    """Markdown, in percent with 95 % half widths over episodes. Rows that were not evaluated are left out."""
    lines: list[str] = []
    for k_shot in k_shots:
        settings = [_setting(result, k_shot) for result in results]
        head = " | ".join(f"seed {s}" for s in seeds)
        lines += [f"### {settings[0]['n_way']}-way {k_shot}-shot", "", f"| | {head} |", "|---|" + "---|" * len(seeds)]
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


def holds(results: Sequence[dict[str, Any]], *, k_shots: Sequence[int] = (1, 5)) -> bool:
    """Whether student > RGB pretrained > random, with the whole paired interval above 0, for each seed and shot."""
    return all(
        _setting(result, k)["differences"][f"{a} - {b}"]["low"] > 0
        for result in results
        for k in k_shots
        for a, b in DIFFERENCES[:2]
    )
