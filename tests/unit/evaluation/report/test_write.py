import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mmdistill.evaluation.report import figures
from mmdistill.evaluation.report.html_page import typical_episode
from mmdistill.evaluation.report.write import print_tables, to_json, write_report
from mmdistill.fewshot.features import Features
from mmdistill.fewshot.protocol import Protocol, Results, run_protocol
from tests.synthetic_features import make_features

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def results() -> Results:
    networks = [
        make_features("student_rgb", 1.5, views=2, input_mode="2 tube masks"),
        make_features("student_rgb", 1.5),
        make_features("<script>alert(1)</script>", 3.0),
        make_features("random", 9.0),
    ]
    protocol = Protocol(
        k_shot=(1, 5), q_sample=6, episodes=40, classifiers=("centroid", "knn"), probe=True, disjoint="video"
    )
    return run_protocol(networks, protocol, show_progress=False)


@pytest.fixture(scope="module")
def page(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(results, folder, read_frame=read_frame, extra={"config": {"seed": 0}})


def read_frame(clip: int) -> np.ndarray:
    return np.full((112, 199, 3), clip % 250, np.uint8)


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
    assert last["rows"]["random (whole clips)"] == results.rows[-1].summary
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
    assert "near_ad_stroke_fh_gs_W (10)" in write_report(results, tmp_path).read_text()


def test_tables_show_percent_network_and_paired_difference(results: Results):
    console = Console(width=160, file=io.StringIO())
    print_tables(results, console=console)
    text = console.file.getvalue()
    row = results.headline.summary
    assert f"{100 * row['top1_action_ensemble']:.2f} ± {100 * row['ci95']:.2f}" in text
    assert "scored network: student_rgb, checkpoint /runs/student_rgb.ckpt" in text
    d = next(d for d in results.differences if d["second"] == "random" and d["first_input_mode"] == "2 tube masks")
    assert f"+{100 * d['difference']:.2f} ± {100 * d['ci95']:.2f}" in text
    assert text.count("Δ vs. row") == 4 + 1  # and the footnote
    narrow = Console(width=80, file=io.StringIO())
    print_tables(results, console=narrow)
    assert "…" not in narrow.file.getvalue()


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            assert dict(attrs).get("alt"), "an image without a description"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_self_contained_and_escaped(page: Path):
    found = Page()
    found.feed(page.read_text())
    assert found.open == []
    assert "script" not in found.tags
    assert found.links
    assert all(link.startswith("data:") for link in found.links)
    assert found.tags.count("figure") == 6
    assert found.tags.count("tr") > 30


def test_the_same_results_give_the_same_page(results: Results, page: Path, tmp_path: Path):
    second = write_report(results, tmp_path, read_frame=read_frame, extra={"config": {"seed": 0}})
    assert second.read_bytes() == page.read_bytes()


def test_the_example_episode_is_typical(results: Results):
    row = results.headline
    chosen = row.scores.accuracy[typical_episode(row)]
    assert abs(chosen - row.scores.accuracy.mean()) == np.abs(row.scores.accuracy - row.scores.accuracy.mean()).min()


def test_principal_components_are_those_of_the_covariance():
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * np.array([5, 3, 1, 1, 1, 1], np.float32)
    plane = figures.project(x, method="pca")
    _, singular, right = np.linalg.svd(x.astype(float) - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane), np.abs((x - x.mean(axis=0)) @ right[:2].T), atol=1e-4)
    np.testing.assert_allclose((plane**2).sum(axis=0), singular[:2] ** 2, rtol=1e-5)
    assert figures.project(x[:, :1], method="pca").shape == (50, 2)
    assert figures.project(x, method="tsne").shape == (50, 2)


@pytest.fixture
def profile() -> Iterator[Path]:
    """A folder with a short name: Chromium's sockets in it may have 107 characters, pytest's folders can be longer."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_real_browser_shows_the_page_without_errors_or_requests(page: Path, tmp_path: Path, profile: Path):
    log = tmp_path / "net.json"
    browser = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    no_requests = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--disable-sync"]
    env = {**os.environ, "TMPDIR": str(profile)}
    output = [f"--user-data-dir={profile}", f"--log-net-log={log}", "--window-size=1150,3000"]
    shot = tmp_path / "shot.png"
    command = [*browser, *no_requests, *output, f"--screenshot={shot}", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env)
    console = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    assert shot.stat().st_size > 20_000
    urls = set(re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log.read_text()))
    outside = {url for url in urls if not re.search(r"://[\w.-]*(google|gvt1|chrome)", url)}  # not the browser's
    assert outside == set()

    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</header>", '</header><img src="https://example.org/a.png" alt="x">'))
    command = [*browser, *no_requests, f"--user-data-dir={profile}", "--dump-dom", broken.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env)
    assert "CONSOLE" in run.stderr  # the page's policy blocks the image, and this test detects it
