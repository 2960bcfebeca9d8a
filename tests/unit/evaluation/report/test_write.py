import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from mmdistill.evaluation.report.write import print_tables, to_json, write_report
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, Results, run_protocol
from tests.synthetic_features import make_features, read_gray_frame


def test_json_has_the_documented_keys_and_fractions(results: Results, page: Path):
    found = json.loads((page.parent / "fewshot.json").read_text())
    assert found["network"] == "student_rgb"
    assert found["checkpoint"] == "/runs/student_rgb.ckpt"
    for key in ("", "_std", "_std_error"):
        assert 0 < found[f"top1_action_ensemble{key}"] < 1
    assert found["top1_action_ensemble_std_error"] < found["ci95"] < 0.1
    assert (found["episodes"], found["n_way"], found["k_shot"], found["q_sample"]) == (40, 5, 1, 6)
    assert [(s["k_shot"], s["classifier"]) for s in found["settings"]] == [
        (1, "centroid"),
        (1, "knn"),
        (5, "centroid"),
        (5, "knn"),
    ]
    last = found["settings"][-1]
    assert list(last["rows"]) == [
        "student_rgb",
        "student_rgb (whole clips)",
        "<script>alert(1)</script> (whole clips)",
        "random (whole clips)",
    ]
    assert last["rows"]["random (whole clips)"] == results.settings[-1].rows[-1].summary
    assert len(last["differences"]) == 4 * 3
    pair = last["differences"]["random (whole clips) - student_rgb (whole clips)"]
    back = last["differences"]["student_rgb (whole clips) - random (whole clips)"]
    assert pair["difference"] == -back["difference"] < 0
    assert (pair["low"], pair["high"], pair["ci95"]) == (-back["high"], -back["low"], back["ci95"])
    assert found["config"] == {"seed": 0}
    assert set(found["per_class"]) == set(results.features[0].classes)
    assert found["excluded_classes"] == {}
    assert found["probes"][0]["network"] == "student_rgb"


def test_excluded_classes_are_in_the_json_and_on_the_page(tmp_path: Path):
    f = make_features("student_rgb", 1.0)
    keep = np.flatnonzero((f.labels != 7) | (np.arange(len(f.labels)) % 3 == 0))
    small = Features(
        f.features[keep],
        f.labels[keep],
        tuple(f.ids[i] for i in keep),
        tuple(f.groups[i] for i in keep),
        f.classes,
        f.info,
    )
    results = run_protocol([small], Protocol(episodes=10, classifiers=("centroid",)), show_progress=False)
    assert to_json(results)["excluded_classes"] == {"near_ad_stroke_fh_gs_W": 10}
    text = write_report(results, tmp_path).read_text()
    assert text.index("near_ad_stroke_fh_gs_W (10)") < text.index('<p class="lead">')
    (line,) = Protocol(episodes=10).check(small.labels.tolist(), small.groups, small.classes)
    assert f"<li>{line}</li>" in text  # as the terminal prints it


def test_tables_show_percent_network_and_paired_difference(results: Results):
    console = Console(width=160, file=io.StringIO())
    print_tables(results, console=console)
    text = console.file.getvalue()
    row = results.headline.summary
    assert f"{100 * row['top1_action_ensemble']:.2f} ± {100 * row['ci95']:.2f}" in text
    assert "scored network: student_rgb, checkpoint /runs/student_rgb.ckpt" in text
    d = results.settings[0].difference_to_scored(results.settings[0].rows[-1])
    assert d is not None
    assert f"+{100 * d['difference']:.2f} ± {100 * d['ci95']:.2f}" in text
    assert text.count("Δ vs. row") == 4 + 1  # and the footnote
    narrow = Console(width=80, file=io.StringIO())
    print_tables(results, console=narrow)
    assert "…" not in narrow.file.getvalue()


def test_the_same_results_give_the_same_page(results: Results, page: Path, tmp_path: Path):
    second = write_report(results, tmp_path, read_frame=read_gray_frame, extra={"config": {"seed": 0}})
    assert second.read_bytes() == page.read_bytes()
