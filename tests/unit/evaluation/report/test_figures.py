import re

import numpy as np

from mmdistill.evaluation.report import figures
from mmdistill.fewshot.protocol import Results


def test_principal_components_are_those_of_the_covariance():
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32) * np.array([5, 3, 1, 1, 1, 1], np.float32)
    plane = figures.project(x)
    _, singular, right = np.linalg.svd(x.astype(float) - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane), np.abs((x - x.mean(axis=0)) @ right[:2].T), atol=1e-4)
    np.testing.assert_allclose((plane**2).sum(axis=0), singular[:2] ** 2, rtol=1e-5)
    assert figures.project(x[:, :1]).shape == (50, 2)


def test_labels_contain_the_input_mode_if_it_is_not_the_default():
    assert figures.network_label("random", "whole clips", default_mode="whole clips") == "random"
    assert figures.network_label("random", "2 masks", default_mode="whole clips") == "random (2 masks)"


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


def test_probe_bars_name_every_network(results: Results):
    svg = figures.probe_bars(results.probes)
    assert "student_rgb (whole clips)" in svg
    assert "most frequent class" in svg
