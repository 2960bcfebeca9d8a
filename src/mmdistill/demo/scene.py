"""Rallies of the demo dataset: the plan of all rallies, the scene of one rally and its images.

Every random number depends only on `seed`, its purpose and the number of the rally, player or court. Rallies can
therefore be rendered in any order and in any process. Shapes: T frames of a rally, H x W px.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmdistill.demo import motion, render
from mmdistill.demo.strokes import STROKES
from mmdistill.errors import InputError
from mmdistill.randomness import integer_rng

SPLITS = ("train", "val")
# Frames before the first and after the last contact. The 8-frame window of a stroke needs 4 frames before the contact,
# 3 after it and 1 more for the last flow pair.
LEAD_IN, LEAD_OUT = 5, 6
_STREAMS = ("plan", "player", "court", "appearance", "near", "far", "camera", "sensor", "labels", "background")


class DemoError(InputError):
    """Invalid parameters, or a folder that contains another demo dataset. The message states the fix."""


@dataclass(frozen=True)
class DemoParameters:
    """Parameters that define every byte of a demo dataset."""

    seed: int = 0  # seed of all random numbers
    # strength of the variation of colors, light, shake, blur, noise and JPEG quality; 0 none, 1 strong
    nuisance: float = 0.3
    frame_size: tuple[int, int] = (64, 68)  # (H, W) px
    strokes_per_class: tuple[int, int] = (24, 24)  # (train, val) strokes of each class
    strokes_per_rally: int = 6  # maximum number of strokes in a rally. All strokes of a rally have different classes
    people: int = 16  # number of players, and of courts, in each split

    def __post_init__(self) -> None:
        if self.nuisance < 0:
            raise DemoError(f"nuisance is {self.nuisance}; it must be at least 0 (none)")
        if min(self.frame_size) < 32:
            raise DemoError(f"frame_size is {self.frame_size}; both must be at least 32 px to show a player")
        if min(self.strokes_per_class) < 1 or not 1 <= self.strokes_per_rally <= len(STROKES):
            raise DemoError(
                f"strokes_per_class is {self.strokes_per_class} and must be positive; strokes_per_rally is "
                f"{self.strokes_per_rally} and must be between 1 and {len(STROKES)}"
            )

    def rng(self, stream: str, *ids: int) -> np.random.Generator:
        """The random generator of one purpose, independent of all others."""
        return integer_rng(self.seed, 1 + _STREAMS.index(stream), *ids)


@dataclass(frozen=True)
class RallyPlan:
    """One rally before it is rendered. Numbers of players and courts are unique over both splits."""

    video: str
    split: str
    number: int  # unique over both splits
    player: int
    opponent: int
    court: int
    strokes: tuple[int, ...]  # indices into `demo.strokes.STROKES`
    frames: tuple[int, ...]  # of the contacts

    @property
    def num_frames(self) -> int:
        """Frames of the rally."""
        return self.frames[-1] + LEAD_OUT


def plan_rallies(parameters: DemoParameters) -> list[RallyPlan]:
    """Plan all rallies of both splits, without rendering."""
    plans: list[RallyPlan] = []
    for s, split in enumerate(SPLITS):
        rng = parameters.rng("plan", s)
        remaining = np.full(len(STROKES), parameters.strokes_per_class[s])
        first = s * parameters.people
        players, courts = rng.permutation(parameters.people), rng.permutation(parameters.people)
        k = 0
        while remaining.any():
            # Choose the classes with most remaining strokes: all end together, and no rally contains a class twice.
            order = np.argsort(-remaining + 0.5 * rng.uniform(size=len(remaining)), kind="stable")
            chosen = [int(c) for c in order[: parameters.strokes_per_rally] if remaining[c] > 0]
            remaining[chosen] -= 1
            rng.shuffle(chosen)
            chosen.sort(key=lambda c: STROKES[c].fields[0] != "serve")  # serves come first
            gaps = rng.choice([8, 8, 9, 10], len(chosen) - 1)
            # A second serve has its own preparation. With a shorter gap it would cut off the end of the first serve.
            gaps[[STROKES[c].fields[0] == "serve" for c in chosen[1:]]] = 11
            frames = LEAD_IN + np.concatenate([[0], np.cumsum(gaps)]).astype(int)
            turn = k // parameters.people
            plans.append(
                RallyPlan(
                    video=f"demo_{split}_{k:03d}",
                    split=split,
                    number=1000 * s + k,
                    player=first + int(players[k % parameters.people]),
                    opponent=first + int(players[(k + 1 + turn % (parameters.people - 1)) % parameters.people]),
                    court=first + int(courts[(k + 3 * turn) % parameters.people]),
                    strokes=tuple(chosen),
                    frames=tuple(int(f) for f in frames),
                )
            )
            k += 1
    return plans


@dataclass(frozen=True)
class RallyScene:
    """Everything that is needed to draw a rally."""

    camera: render.Camera  # projects world points to pixels
    affine: np.ndarray  # (T, 2, 3) camera shake
    background: np.ndarray  # (T, 2, 3) camera shake and movement of the court and the far player
    # near and far player: motion and clothes
    players: tuple[tuple[motion.Figure, render.Outfit], tuple[motion.Figure, render.Outfit]]
    keypoints: np.ndarray  # (2, T, 17, 2) exact joint positions in px
    ball: np.ndarray  # (T, 3) meters
    appearance: render.Appearance  # colors, light and image quality
    court: np.ndarray  # image of the empty court, supersampled


def _far_strokes(plan: RallyPlan, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """Strokes and contact times of the far player: halfway between the near player's contacts, without serves."""
    others = [k for k, stroke in enumerate(STROKES) if stroke.fields[0] != "serve"]
    midpoints = [0.5 * (a + b) for a, b in pairwise(plan.frames)]
    contacts = [*midpoints, plan.frames[-1] + 4.5]
    return [int(rng.choice(others)) for _ in contacts], contacts


def _ball_track(near: motion.Figure, far: motion.Figure, plan: RallyPlan, far_contacts: list[float]) -> np.ndarray:
    """Ball positions (T, 3) in meters, on arcs from racket to racket."""

    def racket_head(figure: motion.Figure, time: float) -> np.ndarray:
        k = min(round(time), plan.num_frames - 1)
        head: np.ndarray = figure.grip[k] + 0.5 * figure.racket[k]
        return head

    times, positions = [plan.frames[0] - 4.5], [racket_head(far, far_contacts[0])]
    for contact, far_contact in zip(plan.frames, far_contacts, strict=True):
        times += [contact, far_contact]
        positions += [racket_head(near, contact), racket_head(far, far_contact)]
    t = np.clip(np.arange(plan.num_frames), times[0], times[-1])
    ball = np.stack([np.interp(t, times, axis) for axis in np.stack(positions, 1)], -1)
    i = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    u = (t - np.take(times, i)) / np.take(np.diff(times), i)
    ball[:, 2] += 4 * 1.1 * u * (1 - u)
    return ball


def build_scene(plan: RallyPlan, parameters: DemoParameters) -> RallyScene:
    """Build motion, camera and appearance of a rally."""
    size, n, number = parameters.frame_size, parameters.nuisance, plan.number
    body = motion.random_body(parameters.rng("player", plan.player))
    other = motion.random_body(parameters.rng("player", plan.opponent))
    style = render.random_court(parameters.rng("court", plan.court), n)
    rng = parameters.rng("appearance", number)
    appearance = render.random_appearance(style, rng, n, size)
    outfits = [render.random_outfit(appearance, rng, n) for _ in range(2)]

    rng = parameters.rng("near", number)
    hits = [float(frame) for frame in plan.frames]
    poses = motion.interpolate_poses(list(plan.strokes), hits, plan.num_frames, body, rng)
    walk = motion.interpolate_positions(hits, plan.num_frames, 0.10, rng)
    near = motion.solve_joints(poses, *walk, float(rng.uniform(-0.9, 0.1)), body, facing=1)
    rng = parameters.rng("far", number)
    strokes, contacts = _far_strokes(plan, rng)
    poses = motion.interpolate_poses(strokes, contacts, plan.num_frames, other, rng)
    walk = motion.interpolate_positions(contacts, plan.num_frames, 0.4, rng)
    far = motion.solve_joints(poses, *walk, render.COURT_LENGTH + float(rng.uniform(-1.5, 0.5)), other, facing=-1)

    rng = parameters.rng("camera", number)
    spread = min(n, 1.5)
    fill = 0.595 + 0.02 * spread * rng.uniform(-1, 1)  # fraction of the image height that a standing player covers
    visible = 1.79 / fill  # meters
    ground = near.ground[:, 1].mean()
    position = (style.offset + 0.15 * spread * rng.uniform(-1, 1), ground - style.distance, style.height)
    target = (0.06 * spread * rng.uniform(-1, 1), ground, visible * (0.5 - 0.06))
    focal = size[0] * float(np.hypot(style.distance, style.height - target[2])) / visible
    camera = render.Camera.look_at(position, target, focal, size)
    affine = render.random_camera_shake(plan.num_frames, appearance.jitter * size[0] / 64, size, rng)
    court = render.draw_court(camera, appearance, rng, size)
    rng = parameters.rng("background", number)
    court = render.add_texture(court, appearance.texture, rng, size)
    background = affine.copy()
    background[..., 2] += render.random_drift(plan.num_frames, appearance.drift * size[0] / 64, rng)
    pairs = ((near, affine), (far, background))
    keypoints = np.stack([render.apply_affine(a, camera.project(figure.joints)[0]) for figure, a in pairs])
    return RallyScene(
        camera=camera,
        affine=affine,
        background=background,
        players=((near, outfits[0]), (far, outfits[1])),
        keypoints=keypoints.astype(np.float32),
        ball=_ball_track(near, far, plan, contacts),
        appearance=appearance,
        court=court,
    )


def _draw_ball(canvas: render.Canvas, scene: RallyScene, t: int) -> None:
    uv, depth = scene.camera.project(scene.ball[t])
    share = np.clip(scene.ball[t, 1] / render.COURT_LENGTH, 0, 1)  # near the far player it moves with the background
    affine = (1 - share) * scene.affine[t] + share * scene.background[t]
    uv = affine[:, :2] @ uv + affine[:, 2]
    radius = max(0.06 * scene.camera.focal / float(depth), 0.55)
    canvas.fill_hull(uv[None], np.array([radius]), (226.0, 240.0, 90.0))


def render_rally(scene: RallyScene, plan: RallyPlan, parameters: DemoParameters) -> Iterator[np.ndarray]:
    """Render the images of a rally, uint8 (H, W, 3) RGB, before JPEG compression."""
    rng = parameters.rng("sensor", plan.number)
    near, far = scene.players
    for t in range(plan.num_frames):
        canvas = render.Canvas(render.warp_court(scene.court, scene.background[t]))
        render.draw_player(canvas, scene.camera, scene.background[t], *far, t)
        is_behind = scene.ball[t, 1] > near[0].ground[t, 1] + 0.8  # the ball, seen from the camera
        if is_behind:
            _draw_ball(canvas, scene, t)
        render.draw_player(canvas, scene.camera, scene.affine[t], *near, t)
        if not is_behind:
            _draw_ball(canvas, scene, t)
        yield render.postprocess(canvas, scene.appearance, rng)
