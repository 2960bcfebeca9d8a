"""Images of clips: known colors, hidden values, one brightness scale, and their layout in a figure."""

import logging

import numpy as np
import pytest
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure

from mmdistill.modalities import ModalitySpec
from mmdistill.modalities.images import (
    choose_fonts,
    display_scale,
    draw_image_grid,
    draw_over_frames,
    hide_removed_tokens,
    render_clip,
    set_figure_title,
)

FLOW = ModalitySpec("flow", 2, 1, (0.0,), (1.0,), "pixel")
RGB = ModalitySpec("rgb", 3, 1, (0.5,), (0.5,), "pixel")


def test_colors_of_known_values() -> None:
    right = torch.zeros(2, 1, 1, 2)
    right[0, 0, 0, 0] = 3.0
    colors = render_clip(right, FLOW, scale=3.0)
    assert colors[0, 0].tolist() == [[1, 0, 0], [1, 1, 1]]  # motion to the right is red, no motion is white
    assert render_clip(torch.full((3, 1, 1, 1), -1.0), RGB)[0, 0, 0].tolist() == [0, 0, 0]
    assert render_clip(torch.full((3, 1, 1, 1), float("nan")), RGB)[0, 0, 0].tolist() == [0.5] * 3


def test_scale_is_the_value_at_full_brightness() -> None:
    spec = ModalitySpec("skeleton", 17, 1, (0.5,), (2.0,), "pixel", sigma=1.0)
    clip = torch.zeros(17, 1, 1, 2)
    clip[3, 0, 0, 1] = 1.0
    assert display_scale(clip, spec) == 2.5  # 1 * 2 + 0.5
    assert display_scale(clip, spec, is_energy=True) == 2.0  # an energy has no mean
    assert display_scale(torch.zeros(2, 1, 1, 1), FLOW) == pytest.approx(1e-6)  # never 0
    np.testing.assert_allclose(render_clip(clip, spec)[0, 0, :, 0], [0.2, 1.0])
    np.testing.assert_allclose(render_clip(clip, spec, scale=5.0)[0, 0, :, 0], [0.1, 0.5])


def test_removed_tokens_are_hidden() -> None:
    clip = torch.arange(4 * 4 * 6.0).view(1, 4, 4, 6)
    shown = hide_removed_tokens(clip, torch.tensor([0, 11]), (2, 2, 3))  # tokens of 2 x 2 x 2
    expected = torch.full_like(clip, torch.nan)
    expected[:, :2, :2, :2], expected[:, 2:, 2:, 4:] = clip[:, :2, :2, :2], clip[:, 2:, 2:, 4:]
    torch.testing.assert_close(shown, expected, equal_nan=True)


def test_flow_and_joints_are_drawn_over_frames() -> None:
    frames = np.full((1, 4, 4, 3), 0.25, np.float32)
    flow = torch.zeros(2, 1, 4, 4)
    flow[0, 0, 1, 2], flow[0, 0, 3, 3] = 2.0, 1.0  # to the right: red
    drawn = draw_over_frames(frames, flow, FLOW)
    assert drawn[0, 0, 0].tolist() == [0.25] * 3  # no motion: the frame
    np.testing.assert_allclose(drawn[0, 1, 2], [1, 0, 0])
    np.testing.assert_allclose(drawn[0, 3, 3], 0.5 * np.array([1, 0.5, 0.5]) + 0.125)
    heat_maps = ModalitySpec("skeleton", 17, 2, (0.5,), (0.25,), "pixel", sigma=1.0)
    joints = torch.full((17, 1, 2, 2), -2.0)  # the normalized 0
    joints[5, 0, 0, 0] = 2.0  # the normalized 1
    drawn = draw_over_frames(frames, joints, heat_maps)
    np.testing.assert_allclose(drawn[0, 0, 0], [1, 0.85, 0], rtol=1e-6)
    np.testing.assert_allclose(drawn[0, 3, 3], [0.25] * 3)


def test_grid_has_a_row_per_entry_and_a_column_per_title() -> None:
    figure = Figure()
    image = np.zeros((4, 6, 3), np.float32)
    draw_image_grid(figure, {"a": [image, image + 1], "b": [image + 0.5, image]}, ["frame 0", "frame 4"])
    assert [ax.get_title() for ax in figure.axes] == ["frame 0", "frame 4", "", ""]
    assert [ax.get_ylabel() for ax in figure.axes] == ["a", "", "b", ""]
    assert [float(ax.images[0].get_array().max()) for ax in figure.axes] == [0.0, 1.0, 0.5, 0.0]


def test_characters_without_a_font_are_shown_as_codes_and_reported(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts = [f for f in font_manager.fontManager.ttflist if f.name == "DejaVu Sans" or "LastResort" in f.fname]
    assert any("LastResort" in font.fname for font in fonts), "it has all characters, as boxes"
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    missing = "球"
    choose_fonts.cache_clear()
    figure = Figure()
    with caplog.at_level(logging.WARNING):
        set_figure_title(figure, f"rally_{missing}", 9)
    assert figure.get_suptitle() == r"rally_\u7403"
    assert missing in caplog.text
    assert choose_fonts("rally") == (["DejaVu Sans"], frozenset())
    choose_fonts.cache_clear()


def test_a_character_is_drawn_with_an_installed_font_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = font_manager.FontEntry(fname=font_manager.findfont("DejaVu Sans Mono"), name="Other")
    default = font_manager.findfont("STIXGeneral")
    characters = {chr(code) for code in font_manager.get_font(installed.fname).get_charmap()}
    only_there = max(characters - {chr(code) for code in font_manager.get_font(default).get_charmap()})
    monkeypatch.setattr(font_manager, "findfont", lambda _: default)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [installed])
    choose_fonts.cache_clear()
    assert choose_fonts(f"a{only_there}") == (["DejaVu Sans", "Other"], frozenset())
    choose_fonts.cache_clear()
