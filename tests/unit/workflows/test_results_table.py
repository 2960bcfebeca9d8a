"""Results table and comparison with the baselines, on known numbers."""

from typing import Any

from mmdistill.workflows.results_table import render_results_table, student_beats_baselines


def make_results(student: float, teacher: float, random: float, *, low: float) -> dict[str, Any]:
    """Content of fewshot.json with the given accuracies in percent and the lower bound of every difference."""
    rows = {"student_rgb": student, "teacher_rgb": teacher, "random": random}
    pairs = (("student_rgb", "teacher_rgb"), ("teacher_rgb", "random"))
    return {
        "settings": [
            {
                "n_way": 4,
                "k_shot": k,
                "rows": {n: {"top1_action_ensemble": v / 100, "ci95": 0.004} for n, v in rows.items()},
                "differences": {
                    f"{a} - {b}": {"difference": (rows[a] - rows[b]) / 100, "ci95": 0.01, "low": low} for a, b in pairs
                },
            }
            for k in (1, 5)
        ]
    }


def test_table_has_a_column_per_seed_and_omits_missing_rows() -> None:
    text = render_results_table([make_results(70, 60, 25, low=0.1), make_results(50, 60, 25, low=-0.11)], [3, 8])
    assert "| | seed 3 | seed 8 |" in text
    assert text.count("### 4-way") == 2
    assert "| distilled student (RGB at test time) | 70.0 ± 0.4 | 50.0 ± 0.4 |" in text
    assert "| *difference student_rgb − teacher_rgb* | +10.0 ± 1.0 | -10.0 ± 1.0 |" in text
    assert "RGB alone" not in text
    assert "flow" not in text


def test_every_interval_must_be_above_zero() -> None:
    good = make_results(70, 60, 25, low=0.1)
    assert student_beats_baselines([good, good])
    assert not student_beats_baselines([good, make_results(60, 60, 25, low=-0.001)])
