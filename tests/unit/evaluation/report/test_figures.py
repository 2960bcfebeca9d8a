import re
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from mmdistill.evaluation.report import figures
from mmdistill.fewshot.protocol import Results


def test_principal_components_are_those_of_the_covariance():
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * np.array([5, 3, 1, 1, 1, 1], np.float32)
    plane = figures.project(x)
    _, singular, right = np.linalg.svd(x.astype(float) - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane), np.abs((x - x.mean(axis=0)) @ right[:2].T), atol=1e-4)
    np.testing.assert_allclose((plane**2).sum(axis=0), singular[:2] ** 2, rtol=1e-5)
    assert figures.project(x[:, :1]).shape == (50, 2)


def test_long_names_are_shortened_in_the_middle():
    name = "near_ad_stroke_fh_gs_DL_approach_winner"
    assert figures.shorten(name) == name[:19] + "…" + name[-14:]
    assert figures.shorten("short") == "short"


def test_the_confusion_matrix_shows_the_most_frequent_classes(results: Results):
    svg, shown = figures.confusion_matrix(results.headline, results.features[0].classes, limit=3)
    assert shown == 3
    assert "true class" in svg
    percents = [int(value) for value in re.findall(r">(\d+)</text>", svg)]
    assert all(0 <= value <= 100 for value in percents)


def test_figures_are_reproducible(results: Results):
    for draw in (figures.accuracy_by_shots, lambda r: figures.episode_histogram(r.settings[0].rows)):
        assert draw(results) == draw(results)
    first, second = (figures.embedding_map(results.features[:1], most_clips=20, seed=0) for _ in range(2))
    assert first == second


def colors_by_network(svg: str) -> dict[str, str]:
    """Color of the last marker or line before the name of each network in the legend."""
    found, color = {}, ""
    for match in re.finditer(r"(?:fill|stroke): (#[0-9a-f]{6})|>([^<>]+)</text>", svg):
        if match[1]:
            color = match[1]
        else:
            found[match[2]] = color
    return found


def select_networks(results: Results, numbers: list[int]) -> Results:
    """The results of some of the networks."""
    settings = tuple(replace(s, rows=tuple(s.rows[n] for n in numbers)) for s in results.settings)
    return replace(results, settings=settings)


def test_a_network_has_one_color_in_all_figures_and_evaluations(results: Results):
    few = select_networks(results, [1, 3])
    drawn = [figures.accuracy_by_shots(r) for r in (results, few)]
    drawn += [figures.episode_histogram(r.settings[0].rows) for r in (results, few)]
    for svg in drawn:
        found = colors_by_network(svg.replace(" (whole clips)", ""))
        assert found["student_rgb"] == figures.NETWORK_COLORS["student_rgb"].lower()
        assert found["random"] == figures.NETWORK_COLORS["random"].lower()


def test_colors_of_networks_do_not_depend_on_the_other_networks():
    known = ["student_rgb", "teacher_rgb", "teacher_flow", "teacher_skeleton", "random"]
    together = figures.network_colors(known)
    assert len(set(together.values())) == len(known)
    for name in (*known, "mmdistill_rgb"):
        alone = figures.network_colors([name])[name]
        assert figures.network_colors([*known, name])[name] == alone
        assert figures.network_colors([name, *reversed(known)])[name] == alone
    assert figures.network_colors(["pretrained_flow"])["pretrained_flow"] == together["teacher_flow"]
    own = [f"run_{number}" for number in range(5)]
    assert len(set(figures.network_colors([*own, *known]).values())) == 10


def test_accuracy_by_shots_has_units_chance_and_separate_points(results: Results):
    svg = figures.accuracy_by_shots(results)
    for text in ("accuracy (%)", "support clips per class (K)", "chance (100 % / N)"):
        assert f">{text}</text>" in svg
    width, height = (float(v) for v in re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg).groups())
    assert width >= 500
    assert height >= 300
    axis = Figure().subplots()
    figures._draw_shots_panel(axis, [setting for setting in results.settings if setting.classifier == "knn"])
    x = np.array([bars.lines[0].get_xdata() for bars in axis.containers])  # networks, numbers of shots
    assert x.shape == (4, 2)
    assert np.diff(np.sort(x.ravel())).min() > 0.04  # no two intervals have the same position
    assert np.abs(x - np.array([0, 1])).max() < 0.5  # nearest to the own number of shots


def test_probe_bars_name_every_network(results: Results):
    svg = figures.probe_bars(results.probes)
    assert "student_rgb (whole clips)" in svg
    assert "most frequent class" in svg
    for network in {probe["network"] for probe in results.probes}:
        assert figures.network_colors([network])[network].lower() in svg
