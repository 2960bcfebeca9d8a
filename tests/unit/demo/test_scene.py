"""Plans and scenes of demo rallies: balanced, split by player and court, and images that match the joints."""

from collections import Counter

import numpy as np
import pytest

from mmdistill.demo import render
from mmdistill.demo.dataset import rally_record
from mmdistill.demo.scene import (
    DemoError,
    DemoParameters,
    RallyPlan,
    RallyScene,
    build_scene,
    plan_rallies,
    render_rally,
)
from mmdistill.demo.strokes import STROKES

Scene = tuple[RallyPlan, DemoParameters, RallyScene]


def player_mask(scene: RallyScene, t: int, *, person: int = 0) -> np.ndarray:
    """Pixels of a player and the racket in frame t: bool (H, W)."""
    figure, outfit = scene.players[person]
    white = render.Outfit(dict.fromkeys(outfit.colors, (255.0, 255.0, 255.0)), sleeve=0.5)
    canvas = render.Canvas.blank(scene.appearance.light.shape[:2])
    render.draw_player(canvas, scene.camera, (scene.affine, scene.background)[person][t], figure, white, t)
    mask: np.ndarray = canvas.downsample()[..., 0] > 60
    return mask


def test_default_plan_is_balanced_and_large_enough() -> None:
    plans = plan_rallies(DemoParameters())
    for split in ("train", "val"):
        counts = Counter(stroke for plan in plans if plan.split == split for stroke in plan.strokes)
        assert set(counts.values()) == {24}
        assert len(counts) == len(STROKES)
    assert sum(len(plan.strokes) for plan in plans) >= 560
    assert all(len(set(plan.strokes)) == len(plan.strokes) for plan in plans)  # no class twice in a rally


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_stroke_has_a_complete_window_with_flow(seed: int) -> None:
    for plan in plan_rallies(DemoParameters(seed=seed)):
        assert min(plan.frames) - 4 >= 0
        assert max(plan.frames) + 3 <= plan.num_frames - 2
        assert all(later - frame >= 8 for frame, later in zip(plan.frames, plan.frames[1:], strict=False))


def test_splits_share_neither_player_nor_court() -> None:
    parameters = DemoParameters()
    found: dict[str, dict[str, set[object]]] = {}
    for plan in plan_rallies(parameters):
        assert plan.player != plan.opponent
        court = render.random_court(parameters.rng("court", plan.court), parameters.nuisance)
        ids = found.setdefault(plan.split, {"people": set(), "court": set(), "colors": set(), "names": set()})
        ids["people"] |= {plan.player, plan.opponent}
        ids["court"].add(plan.court)
        ids["colors"].add((court.colors["court"], court.height))
        ids["names"].add(rally_record(plan, parameters)["near_name"])
    for key in ("people", "court", "colors", "names"):
        assert found["train"][key].isdisjoint(found["val"][key])


def test_another_seed_gives_other_rallies() -> None:
    first, second = (plan_rallies(DemoParameters(seed=seed)) for seed in (0, 1))
    assert [plan.strokes for plan in first] != [plan.strokes for plan in second]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nuisance": -1.0}, "nuisance is -1.0; it must be at least 0"),
        ({"frame_size": (8, 8)}, "frame_size is .* at least 32 px"),
        ({"strokes_per_class": (0, 5)}, "strokes_per_class is .* must be positive"),
        ({"strokes_per_rally": 99}, "strokes_per_rally is 99 and must be between 1 and"),
    ],
)
def test_invalid_parameters_are_rejected(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(DemoError, match=message):
        DemoParameters(**wrong)  # type: ignore[arg-type]


def test_joints_lie_on_the_drawn_players(scene: Scene) -> None:
    plan, _, built = scene
    for person in (0, 1):
        hits = []
        for t in range(plan.num_frames):
            mask = player_mask(built, t, person=person)
            x, y = np.rint(built.keypoints[person, t]).astype(int).T
            visible = (x >= 0) & (x < 68) & (y >= 0) & (y < 64)
            hits.append(mask[y[visible], x[visible]])
        assert np.concatenate(hits).mean() > 0.97


def test_near_player_fills_half_of_the_height_and_is_seen_from_behind() -> None:
    for plan in plan_rallies(DemoParameters())[::9]:
        built = build_scene(plan, DemoParameters())
        near = built.keypoints[0]
        height = near[:, 15:, 1].max(1) - near[:, :5, 1].min(1)
        assert 0.42 * 64 < np.median(height) < 0.66 * 64  # eyes to ankles: less than the drawn player
        assert np.median(near[:, 6, 0] - near[:, 5, 0]) > 0  # right shoulder to the right
        assert (
            np.median(built.keypoints[1, :, 6, 0] - built.keypoints[1, :, 5, 0]) < 0
        )  # the far player faces the camera
        assert built.keypoints[1, :, :, 1].mean() < near[:, :, 1].mean()


def test_image_shows_the_player_inside_the_mask(plain_scene: Scene) -> None:
    plan, parameters, built = plain_scene
    t = plan.frames[0]
    image = list(render_rally(built, plan, parameters))[t].astype(float)
    empty = render.Canvas(render.warp_court(built.court, built.affine[t]))
    background = render.postprocess(empty, built.appearance, np.random.default_rng(0))
    changed = np.abs(image - background).sum(-1) > 60
    mask = player_mask(built, t)
    assert changed[mask].mean() > 0.8
    assert changed[:, ~mask.any(0)].mean() < 0.1
