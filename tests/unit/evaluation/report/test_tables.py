from dataclasses import replace

import pytest

from mmdistill.evaluation.report.tables import (
    COLUMNS,
    FOOTNOTES,
    PROBE_COLUMNS,
    REFERENCE,
    difference_to_scored,
    make_tables,
    probe_rows,
    probe_title,
    row_cells,
    select_rows,
    table_title,
)
from mmdistill.fewshot.protocol import Results


def test_there_is_a_table_per_combination_and_classifier_and_one_of_the_probes(results: Results):
    tables = make_tables(results)
    assert len(tables) == 2 * 2 + 1
    assert [len(table.rows) for table in tables] == [4] * 5
    assert tables[0].title == "5-way 1-shot, centroid: 40 episodes from 8 classes, 6 queries per class"


def test_rows_of_a_table_have_its_setting(results: Results):
    rows = select_rows(results, 5, 5, "knn")
    assert [row.network for row in rows] == ["student_rgb", "student_rgb", "<script>alert(1)</script>", "random"]
    assert {table_title(row) for row in rows} == {"5-way 5-shot, knn: 40 episodes from 8 classes, 6 queries per class"}


def test_the_difference_is_that_of_the_scored_network(results: Results):
    scored, *others = select_rows(results, 5, 1, "centroid")
    assert difference_to_scored(results, scored) is None
    for row in others:
        difference = difference_to_scored(results, row)
        assert difference is not None
        expected = scored.scores.accuracy.mean() - row.scores.accuracy.mean()
        assert difference["difference"] == pytest.approx(expected)


def test_cells_are_percent_and_the_encoding_time_is_seconds(results: Results):
    row = select_rows(results, 5, 1, "centroid")[-1]
    cells = row_cells(results, row)
    assert len(cells) == len(COLUMNS)
    assert cells[:2] == ("random", "whole clips")
    assert cells[2].startswith(f"{100 * row.summary['top1_action_ensemble']:.2f} ± ")
    assert cells[4].startswith("+")
    assert cells[5] == "1.2"


def test_the_scored_network_is_the_reference_of_the_differences(results: Results):
    deltas = [row_cells(results, row)[4] for row in select_rows(results, 5, 1, "centroid")]
    assert deltas[0] == REFERENCE
    assert REFERENCE not in deltas[1:]
    assert any(REFERENCE in footnote for footnote in FOOTNOTES)


def test_an_unknown_encoding_time_is_a_dash(results: Results):
    row = results.rows[0]
    summary = {key: value for key, value in row.summary.items() if key != "seconds"}
    assert row_cells(results, replace(row, summary=summary))[5] == "–"


def test_a_footnote_explains_each_column_of_numbers():
    text = " ".join(FOOTNOTES)
    for name in ("±", "std is the standard deviation", "Δ vs. row (paired)", "Encoding time"):
        assert name in text


def test_probe_rows_are_percent(results: Results):
    rows = probe_rows(results)
    assert {len(cells) for cells in rows} == {len(PROBE_COLUMNS)}
    assert rows[0][2] == f"{100 * results.probes[0]['linear_top1']:.2f}"
    assert probe_title(results).startswith("Full label set: 8 classes, ")
