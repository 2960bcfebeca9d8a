"""Points and plots of a sweep."""

import warnings
from pathlib import Path

import pytest

from mmdistill.modalities import images
from mmdistill.workflows.sweep_plot import mean_over_seeds, plot_sweep, plotted_keys, sort_values, to_grid
from mmdistill.workflows.sweep_results import read_sweep, swept_keys
from tests.unit.workflows.sweep_jobs import write_job


def test_two_keys_give_a_heat_map_and_seeds_are_averaged(tmp_path: Path) -> None:
    jobs = [(t, r, s) for t in ("[rgb]", "[rgb,flow]") for r in (0.5, 0.75) for s in (0, 1)]
    for i, (teachers, ratio, seed) in enumerate(jobs):
        text = [f"trainer.teachers={teachers}", f"data_module.mask_ratio={ratio}", f"seed={seed}"]
        write_job(tmp_path, i, text, shots={1: 0.4 + 0.1 * ratio + 0.2 * seed + 0.1 * len(teachers)})
    rows = read_sweep(tmp_path)
    assert swept_keys(rows) == ["trainer.teachers", "data_module.mask_ratio", "seed"]
    assert plotted_keys(rows) == ["trainer.teachers", "data_module.mask_ratio"]
    points = mean_over_seeds(rows, ["trainer.teachers", "data_module.mask_ratio"])
    assert points[("[rgb]", "0.5")] == pytest.approx((0.45 + 0.1 + 0.1 * 5, 0.1))
    xs, ys, values = to_grid(points)
    assert (xs, ys, values.shape) == (["0.5", "0.75"], ["[rgb]", "[rgb,flow]"], (2, 2))
    assert plot_sweep(rows, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_single_point_is_not_plotted(tmp_path: Path) -> None:
    write_job(tmp_path, 0, ["seed=1"], loss=1.0)
    assert not plot_sweep(read_sweep(tmp_path), tmp_path / "sweep.png")
    assert not (tmp_path / "sweep.png").exists()


def test_numbers_are_sorted_by_value_and_words_keep_their_order() -> None:
    assert sort_values(["10", "9", "10"]) == ["9", "10"]
    assert sort_values(["b", "a", "b"]) == ["b", "a"]


def test_values_in_chinese_use_fonts_that_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def choose(text: str) -> tuple[list[str], frozenset[str]]:
        texts.append(text)
        return ["DejaVu Serif"], frozenset()

    monkeypatch.setattr(images, "choose_fonts", choose)
    for number, name in enumerate(("a", "网球")):
        write_job(tmp_path, number, [f"data_module.name={name}"], loss=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the test machine may have no such font
        assert plot_sweep(read_sweep(tmp_path), tmp_path / "sweep.png")
    assert texts == ["a网球"]
