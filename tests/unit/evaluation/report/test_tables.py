from dataclasses import replace

import pytest

from mmdistill.evaluation.report.tables import (
    COLUMNS,
    FOOTNOTES,
    PROBE_COLUMNS,
    REFERENCE,
    below_chance_note,
    network_label,
    probe_tables,
    result_tables,
    row_cells,
    table_title,
)
from mmdistill.fewshot.protocol import Results


def test_labels_contain_the_input_mode_if_it_is_not_the_default():
    assert network_label("random", "whole clips", default_mode="whole clips") == "random"
    assert network_label("random", "2 masks", default_mode="whole clips") == "random (2 masks)"


def test_there_is_a_table_per_combination_and_classifier_and_one_of_the_probes(results: Results):
    tables = [*result_tables(results), *probe_tables(results)]
    assert len(tables) == 2 * 2 + 1
    assert [len(table.rows) for table in tables] == [4] * 5
    assert tables[0].title == "5-way 1-shot, centroid: 40 episodes from 8 classes, 6 queries per class"
    assert probe_tables(replace(results, probes=())) == []


def test_rows_of_a_table_have_its_setting(results: Results):
    setting = results.settings[-1]
    assert (setting.n_way, setting.k_shot, setting.classifier) == (5, 5, "knn")
    networks = ["student_rgb", "student_rgb", "<script>alert(1)</script>", "random"]
    assert [row.network for row in setting.rows] == networks
    titles = {table_title(row) for row in setting.rows}
    assert titles == {"5-way 5-shot, knn: 40 episodes from 8 classes, 6 queries per class"}


def test_the_difference_is_that_of_the_scored_network(results: Results):
    setting = results.settings[0]
    scored, *others = setting.rows
    assert setting.difference_to_scored(scored) is None
    for row in others:
        difference = setting.difference_to_scored(row)
        assert difference is not None
        expected = scored.scores.accuracy.mean() - row.scores.accuracy.mean()
        assert difference["difference"] == pytest.approx(expected)


def test_cells_are_percent_and_the_encoding_time_is_seconds(results: Results):
    row = results.settings[0].rows[-1]
    cells = row_cells(results.settings[0], row)
    assert len(cells) == len(COLUMNS)
    assert cells[:2] == ("random", "whole clips")
    assert cells[2].startswith(f"{100 * row.summary['top1_action_ensemble']:.2f} ± ")
    assert cells[4].startswith("+")
    assert cells[5] == "1.2"


def test_the_scored_network_is_the_reference_of_the_differences(results: Results):
    deltas = [cells[4] for cells in result_tables(results)[0].rows]
    assert deltas[0] == REFERENCE
    assert REFERENCE not in deltas[1:]
    assert any(REFERENCE in footnote for footnote in FOOTNOTES)


def test_an_unknown_encoding_time_is_a_dash(results: Results):
    row = results.headline
    summary = {key: value for key, value in row.summary.items() if key != "seconds"}
    assert row_cells(results.settings[0], replace(row, summary=summary))[5] == "–"


def test_a_footnote_explains_each_column_of_numbers():
    text = " ".join(FOOTNOTES)
    for name in ("±", "std is the standard deviation", "Δ vs. row (paired)", "Encoding time"):
        assert name in text


def test_differences_are_in_points():
    assert [name for name in COLUMNS if name.endswith("points")] == ["std, points", "Δ vs. row\n(paired), points"]
    assert "percentage points" in " ".join(FOOTNOTES)


@pytest.mark.parametrize("disjoint", ["video", None])
def test_networks_below_chance_are_named(results: Results, disjoint: str | None):
    assert below_chance_note(results) == ""
    setting = results.settings[0]
    rows = [
        replace(
            row, summary={**row.summary, "top1_action_ensemble": 0.19 - 0.1 * (row.network == "random"), "ci95": 0.02}
        )
        for row in setting.rows
    ]
    found = replace(results, settings=(replace(setting, rows=tuple(rows)),))
    found = replace(found, protocol=replace(results.protocol, disjoint=disjoint))
    note = below_chance_note(found)
    assert note.startswith("Below chance: random. A possible cause:")  # 0.19 ± 0.02 contains 1 / 5
    assert ("data_module.disjoint=video" in note) is (disjoint is None)
    unknown = [replace(f, info={**f.info, "has_groups": False}) for f in results.features]
    note = below_chance_note(replace(found, features=tuple(unknown)))
    assert note == "Below chance: random. The 95 % interval lies below the chance level."


def test_a_network_is_shown_with_its_modality(results: Results):
    setting, features = results.settings[0], results.features
    modalities = ["rgb", "rgb", None, "flow"]
    rows = [replace(r, summary={**r.summary, "modality": m}) for r, m in zip(setting.rows, modalities, strict=True)]
    names = [row_cells(setting, rows[0])[0], *(row_cells(replace(setting, rows=tuple(rows)), r)[0] for r in rows[1:])]
    assert names == ["student_rgb", "student_rgb", "<script>alert(1)</script>", "random (flow)"]
    found = [replace(f, info={**f.info, "modality": "flow"}) for f in features]
    (table,) = probe_tables(replace(results, features=tuple(found)))
    assert table.rows[-1][0] == "random (flow)"


def test_probe_rows_are_percent(results: Results):
    (table,) = probe_tables(results)
    assert {len(cells) for cells in table.rows} == {len(PROBE_COLUMNS)}
    assert table.rows[0][2] == f"{100 * results.probes[0]['linear_top1']:.2f}"
    assert table.title.startswith("Full label set: 8 classes, ")
