"""Tables and sentences of the report card and the shortcut audit, in the log and on the page."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmdistill.data.clips import ClipSource
from mmdistill.evaluation.report.breakdown_tables import (
    report_card_lines,
    report_card_tables,
    shortcut_audit_lines,
    shortcut_audit_tables,
)
from mmdistill.evaluation.report.write import print_tables, to_json, write_report
from mmdistill.fewshot.protocol import Protocol, Results, run_protocol
from mmdistill.fewshot.scores import EpisodeScores
from mmdistill.fewshot.shortcut_audit import AuditLevel
from tests.synthetic_features import make_features

PROTOCOL = Protocol(q_sample=5, episodes=30, classifiers=("centroid",), report_card=True, shortcut_audit=True)


def make_card_results() -> Results:
    """Two networks, 8 classes; near players only, four matches per class, four players but one of the last class."""
    names = [f"near_ad_stroke_{side}_gs_{c}_-_in" for side in ("fh", "bh") for c in ("CC", "DL", "T", "W")]
    networks = []
    for network in ("student_rgb", "<random>"):
        f = make_features(network, 1.0)
        sources = tuple(
            ClipSource(f"m{i % 4}", names[label] if label >= 0 else "", f"p{0 if label == 7 else i % 4}", "RH")
            for i, label in enumerate(f.labels.tolist())
        )
        networks.append(replace(f, sources=sources))
    return run_protocol(networks, PROTOCOL, show_progress=False)


@pytest.fixture(scope="module")
def results() -> Results:
    """Read-only."""
    return make_card_results()


def test_the_card_has_one_row_per_element_with_its_ways_and_chance(results: Results) -> None:
    overview, parts = report_card_tables(results)
    assert overview.columns == ("element", "episodes", "classes", "chance", "student_rgb", "<random>")
    rows = {row[0]: row[1:] for row in overview.rows}
    assert rows["player"] == ("not scored", "1", "–", "not scored", "not scored")
    assert rows["side"][:3] == ("2-way 1-shot", "2", "50.0")
    assert rows["direction"][:3] == ("4-way 1-shot", "4", "25.0")
    summary = results.headline.summary
    cell = f"{100 * summary['top1_action_ensemble']:.2f} ± {100 * summary['ci95']:.2f}"
    assert rows["exact label"][:4] == ("5-way 1-shot", "8", "20.0", cell)
    assert parts.columns == ("element", "near\nplayer", "hand\nRH", "no\nserve", "court\nad")
    assert [row[0] for row in parts.rows] == ["side", "direction", "exact label"]
    lines = report_card_lines(results)
    assert "player: not scored: 1 class (near)" in lines
    assert "side: n_way=2, because it has 2 classes (bh, fh)" in lines


def test_the_audit_states_what_match_court_and_player_explain(results: Results) -> None:
    audit = results.shortcut_audit
    assert audit is not None
    (table,) = shortcut_audit_tables(results)
    assert [row[0] for row in table.rows] == ["any clips", "rally", "match", "player"]
    means = [100 * level.scores[0].accuracy.mean() for level in audit.levels]
    assert [row[1].split(" ±")[0] for row in table.rows] == [f"{mean:.2f}" for mean in means]
    found = audit.explained(0)
    expected = (
        f"student_rgb: {means[1]:.1f} % with disjoint rallies, +{means[1] - 20:.1f} points from chance. Match, court "
        f"and player explain {100 * found['together']['difference']:+.1f} ± {100 * found['together']['ci95']:.1f} "
        f"points of it, {100 * found['together']['share']:.0f} % of the accuracy above chance (match and court "
        f"{means[1] - means[2]:+.1f} ± "
    )
    lines = shortcut_audit_lines(results)
    assert lines[0].startswith(expected)
    name = results.features[0].classes[7]
    assert f"excluded classes, too few clips from different players: {name} (30 clips, 1 player)" in lines
    assert "Setting: 5-way 1-shot from 7 classes, 5 queries per class, centroid, 30 episodes per row." in lines


def _with_accuracy(level: AuditLevel, mean: float) -> AuditLevel:
    noise = np.resize([-0.01, 0.01], 30)

    def change(scores: EpisodeScores) -> EpisodeScores:
        return replace(scores, accuracy=mean + noise)

    return replace(level, scores=tuple(change(scores) for scores in level.scores))


def test_levels_without_episodes_and_scores_at_chance_are_stated(results: Results) -> None:
    audit = results.shortcut_audit
    assert audit is not None
    levels = [_with_accuracy(level, mean) for level, mean in zip(audit.levels, (0.6, 0.5, 0.4, 0.2), strict=True)]

    def first_line(*changed: AuditLevel) -> str:
        return shortcut_audit_lines(replace(results, shortcut_audit=replace(audit, levels=tuple(changed))))[0]

    assert first_line(*levels) == (
        "student_rgb: 50.0 % with disjoint rallies, +30.0 points from chance. Match, court and player explain "
        "+30.0 ± 0.0 points of it, 100 % of the accuracy above chance (match and court +10.0 ± 0.0, "
        "player +20.0 ± 0.0)."
    )
    no_player = AuditLevel("player", not_possible="no names")
    assert first_line(*levels[:3], no_player).endswith(
        "Match and court explain +10.0 ± 0.0 points of it, 33 % of the accuracy above chance."
    )
    assert first_line(*levels[:2], AuditLevel("match", not_possible="x"), no_player).endswith(
        "player explain is unknown."
    )
    changed = replace(results, shortcut_audit=replace(audit, levels=(*levels[:3], no_player)))
    assert "Disjoint by player: no names" in shortcut_audit_lines(changed)
    assert shortcut_audit_tables(changed)[0].rows[3] == ("player", "not possible", "not possible")
    at_chance = [_with_accuracy(level, 0.2) for level in audit.levels]
    assert "above chance" not in first_line(*at_chance)


def test_tables_are_in_the_log_the_results_file_and_the_page(results: Results, tmp_path: Path) -> None:
    text = io.StringIO()
    print_tables(results, console=Console(file=text, width=160))
    for line in (*report_card_lines(results), *shortcut_audit_lines(results)):
        assert line in text.getvalue()
    page = write_report(results, tmp_path).read_text()
    assert '<section id="report-card">' in page
    assert '<section id="shortcut-audit">' in page
    assert "&lt;random&gt;" in page
    assert "<random>" not in page
    found = json.loads((tmp_path / "fewshot.json").read_text())
    assert found == json.loads(json.dumps(to_json(results)))
    assert found["report_card"]["player"] == {"clips": {"near": 240}, "not_scored": "not scored: 1 class (near)"}
    assert found["report_card"]["side"]["networks"]["student_rgb"]["n_way"] == 2
    assert found["shortcut_audit"]["levels"]["player"]["<random>"]["disjoint"] == "player"


def test_results_without_them_have_no_tables() -> None:
    results = run_protocol([make_features("a", 1.0)], replace(PROTOCOL, report_card=False, shortcut_audit=False))
    for make in (report_card_tables, report_card_lines, shortcut_audit_tables, shortcut_audit_lines):
        assert make(results) == []
    assert not {"report_card", "shortcut_audit"} & set(to_json(results))
