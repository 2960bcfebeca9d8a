from pathlib import Path
from typing import Any

from mmdistill.evaluation.report.ledger_tables import ledger_lines, ledger_tables
from mmdistill.evaluation.report.write import write_report
from mmdistill.fewshot.protocol import Results

LEDGER: dict[str, Any] = {
    "epoch": 11,
    "train_clips": 256,
    "held_out_clips": 40,
    "held_out": "val.json",
    "problems": {"flow": "3 of 40 held-out clips lack flow files"},
    "teachers": {
        "rgb": {
            "variance": 0.31,
            "is_constant": False,
            "gradient_share": 1.0,
            "r2": 0.5,
            "r2_by_class": {"<a>": 0.25, "b": None},
        },
        "flow": {"variance": 0.0, "is_constant": True, "gradient_share": 0.0, "r2": None, "r2_by_class": {}},
    },
}


def test_tables_have_a_row_per_teacher_and_per_class() -> None:
    teachers, classes = ledger_tables(LEDGER)
    assert teachers.title == "Teachers after epoch 11: 256 training clips, 40 held-out clips of val.json"
    assert list(teachers.rows) == [
        ("rgb", "0.31", "100.0", "0.500", ""),
        ("flow", "0", "0.0", "–", "constant features: nothing to learn"),
    ]
    assert (classes.columns, list(classes.rows)) == (("class", "rgb", "flow"), [("<a>", "0.250", "–"), ("b", "–", "–")])
    assert ledger_lines(LEDGER)[-1] == "R² of flow is unknown: 3 of 40 held-out clips lack flow files."


def test_page_shows_the_ledger_of_a_checkpoint_that_has_one(results: Results, page: Path, tmp_path: Path) -> None:
    ledger = {**LEDGER, "settings": ["trainer.teacher_weights={flow:2}", "pooling=halves"]}
    text = write_report(results, tmp_path, extra={"ledger": ledger}).read_text()
    assert "Settings of the distillation: trainer.teacher_weights={flow:2}, pooling=halves." in text
    assert "Teachers of the student" in text
    assert "constant features: nothing to learn" in text
    assert "&lt;a&gt;" in text
    assert "Teachers of the student" not in page.read_text()
    assert ledger_tables(None) == []
