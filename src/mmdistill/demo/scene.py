"""From a seed to the pictures of the demo dataset: which rallies there are, who plays where, and what it looks like.

Every random number is a function of `seed`, its purpose and the rally (or player, or court), so that rallies can be
made in any order, in any process, again. ``T`` frames of a rally, ``H`` x ``W`` px.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mmdistill.demo import motion, render
from mmdistill.demo.strokes import STROKES
from mmdistill.errors import InputError

SPLITS = ("train", "val")
DEFAULT_NUISANCE = 0.3
# Frames around a contact that its 8-frame window needs: 4 before, 3 after and one more for the last flow pair.
LEAD_IN, LEAD_OUT = 5, 6
_STREAMS = {"plan": 1, "player": 2, "court": 3, "look": 4, "near": 5, "far": 6, "camera": 7, "sensor": 8, "labels": 9}


class DemoError(InputError):
    """A folder that cannot become the requested demo dataset; the message says what to do."""


@dataclass(frozen=True)
class DemoParameters:
    """What the bytes of a demo dataset depend on.

    Attributes:
        seed: of everything random.
        nuisance: strength of colours, light, shake, blur, noise and JPEG; 0 none, 1 strong.
        frame_size: (H, W) px.
        strokes_per_class: (train, val) strokes of each class.
        strokes_per_rally: at most so many in one rally, each of another class.
        people: players and courts of each split.
    """

    seed: int = 0
    nuisance: float = DEFAULT_NUISANCE
    frame_size: tuple[int, int] = (64, 68)
    strokes_per_class: tuple[int, int] = (24, 24)
    strokes_per_rally: int = 6
    people: int = 16

    def __post_init__(self) -> None:
        if self.nuisance < 0:
            raise DemoError(f"nuisance is {self.nuisance}, but 0 (none) is the least")
        if min(self.frame_size) < 32:
            raise DemoError(f"frame_size is {self.frame_size}, too small to see a player; 32 px is the least")
        if min(self.strokes_per_class) < 1 or not 1 <= self.strokes_per_rally <= len(STROKES):
            raise DemoError(
                f"strokes_per_class {self.strokes_per_class} must be positive and strokes_per_rally "
                f"{self.strokes_per_rally} between 1 and {len(STROKES)}"
            )

    def rng(self, stream: str, *ids: int) -> np.random.Generator:
        """The generator of one purpose; independent of every other one."""
        return np.random.default_rng([self.seed, _STREAMS[stream], *ids])


@dataclass(frozen=True)
class RallyPlan:
    """One rally before it is rendered. `player`, `opponent` and `court` are unique over both splits."""

    video: str
    split: str
    number: int  # unique over both splits
    player: int
    opponent: int
    court: int
    strokes: tuple[int, ...]  # indices into `demo_strokes.STROKES`
    frames: tuple[int, ...]  # contacts
    num_frames: int


def plan_rallies(parameters: DemoParameters) -> list[RallyPlan]:
    """All rallies of both splits; nothing is rendered."""
    plans: list[RallyPlan] = []
    for s, split in enumerate(SPLITS):
        rng = parameters.rng("plan", s)
        left = np.full(len(STROKES), parameters.strokes_per_class[s])
        first = s * parameters.people
        players, courts = rng.permutation(parameters.people), rng.permutation(parameters.people)
        k = 0
        while left.any():
            # The classes with most strokes left, so that all run out together and no rally repeats one.
            order = np.argsort(-left + 0.5 * rng.uniform(size=len(left)), kind="stable")
            chosen = [int(c) for c in order[: parameters.strokes_per_rally] if left[c] > 0]
            left[chosen] -= 1
            rng.shuffle(chosen)
            chosen.sort(key=lambda c: STROKES[c].fields[0] != "serve")  # serves open a rally
            gaps = rng.choice([8, 8, 9, 10], len(chosen) - 1)
            # A second serve starts from its own stance: without the time for it, it would cut off the first one's end.
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
                    num_frames=int(frames[-1]) + LEAD_OUT,
                )
            )
            k += 1
    return plans


@dataclass(frozen=True)
class RallyScene:
    """A rally ready to be drawn.

    Attributes:
        camera, affine: the camera and its shake (T, 2, 3).
        players: near, far.
        keypoints: (2, T, 17, 2) px, true joints.
        ball: (T, 3) metres.
        look: colours and light. court: the empty court, enlarged.
    """

    camera: render.Camera
    affine: np.ndarray
    players: tuple[render.Drawn, render.Drawn]
    keypoints: np.ndarray
    ball: np.ndarray
    look: render.Look
    court: np.ndarray


def _far_strokes(plan: RallyPlan, rng: np.random.Generator) -> tuple[list[int], list[float]]:
    """The far player's answers, half-way between the near player's contacts; he never serves."""
    others = [k for k, stroke in enumerate(STROKES) if stroke.fields[0] != "serve"]
    middle = [0.5 * (a + b) for a, b in pairwise(plan.frames)]
    contacts = [*middle, plan.frames[-1] + 4.5]
    return [int(rng.choice(others)) for _ in contacts], contacts


def _ball_track(near: motion.Figure, far: motion.Figure, plan: RallyPlan, far_contacts: list[float]) -> np.ndarray:
    """Flight from racket to racket, (T, 3) metres."""
    last = plan.num_frames - 1
    stops: list[tuple[float, np.ndarray]] = []
    for frame, answer in zip(plan.frames, far_contacts, strict=True):
        stops.append((frame, near.grip[frame] + 0.5 * near.racket[frame]))
        k = min(round(answer), last)
        stops.append((answer, far.grip[k] + 0.5 * far.racket[k]))
    stops.insert(0, (plan.frames[0] - 4.5, stops[1][1]))
    times, places = np.array([s[0] for s in stops]), np.stack([s[1] for s in stops])
    t = np.clip(np.arange(plan.num_frames), times[0], times[-1])
    ball = np.stack([np.interp(t, times, places[:, d]) for d in range(3)], -1)
    i = np.clip(np.searchsorted(times, t, side="right") - 1, 0, len(times) - 2)
    u = (t - times[i]) / (times[i + 1] - times[i])
    ball[:, 2] += 4 * 1.1 * u * (1 - u)
    return ball


def build_scene(plan: RallyPlan, parameters: DemoParameters) -> RallyScene:
    """Motion, camera and colours of a rally."""
    size, n, number = parameters.frame_size, parameters.nuisance, plan.number
    body = motion.random_body(parameters.rng("player", plan.player))
    other = motion.random_body(parameters.rng("player", plan.opponent))
    court = render.random_court(parameters.rng("court", plan.court), n)
    rng = parameters.rng("look", number)
    look = render.random_look(court, rng, n)
    outfits = [render.random_outfit(look, rng, n) for _ in range(2)]

    rng = parameters.rng("near", number)
    poses = motion.pose_track(list(plan.strokes), [float(f) for f in plan.frames], plan.num_frames, body, rng)
    walk = motion.walk_track([float(f) for f in plan.frames], plan.num_frames, 0.10, rng)
    near = motion.solve(poses, *walk, float(rng.uniform(-0.9, 0.1)), body, facing=1)
    rng = parameters.rng("far", number)
    strokes, contacts = _far_strokes(plan, rng)
    poses = motion.pose_track(strokes, contacts, plan.num_frames, other, rng)
    walk = motion.walk_track(contacts, plan.num_frames, 0.4, rng)
    far = motion.solve(poses, *walk, render.COURT_LENGTH + float(rng.uniform(-1.5, 0.5)), other, facing=-1)

    rng = parameters.rng("camera", number)
    spread = min(n, 1.5)
    share = 0.595 + 0.02 * spread * rng.uniform(-1, 1)  # of the picture's height that a standing player fills
    visible = 1.79 / share
    distance, height = float(court["distance"]), float(court["height"])
    ground = near.ground[:, 1].mean()
    position = (float(court["aim"]) + 0.15 * spread * rng.uniform(-1, 1), ground - distance, height)
    target = (0.06 * spread * rng.uniform(-1, 1), ground, visible * (0.5 - 0.06))
    focal = size[0] * float(np.hypot(distance, height - target[2])) / visible
    camera = render.Camera.look(position, target, focal, size)
    affine = render.shake(plan.num_frames, look.jitter * size[0] / 64, size, rng)
    keypoints = np.stack([render.apply_affine(affine, camera.project(f.joints)[0]) for f in (near, far)])
    return RallyScene(
        camera=camera,
        affine=affine,
        players=(
            render.Drawn(near, outfits[0], body.height, body.build),
            render.Drawn(far, outfits[1], other.height, other.build),
        ),
        keypoints=keypoints.astype(np.float32),
        ball=_ball_track(near, far, plan, contacts),
        look=look,
        court=render.draw_court(camera, look, rng, size),
    )


def _draw_ball(canvas: render.Canvas, scene: RallyScene, t: int) -> None:
    uv, depth = scene.camera.project(scene.ball[t])
    uv = scene.affine[t, :, :2] @ uv + scene.affine[t, :, 2]
    radius = max(0.06 * scene.camera.focal / float(depth), 0.55)
    canvas.hull(uv[None], np.array([radius]), (226.0, 240.0, 90.0))


def render_rally(scene: RallyScene, plan: RallyPlan, parameters: DemoParameters) -> Iterator[np.ndarray]:
    """The pictures of a rally, uint8 (H, W, 3) RGB, before JPEG."""
    rng = parameters.rng("sensor", plan.number)
    light = render.light_map(scene.look, parameters.frame_size)
    for t in range(plan.num_frames):
        canvas = render.Canvas(render.warped_court(scene.court, scene.affine[t]))
        near, far = scene.players
        render.draw_figure(canvas, scene.camera, scene.affine[t], far, t)
        if scene.ball[t, 1] > near.figure.ground[t, 1] + 0.8:
            _draw_ball(canvas, scene, t)
            render.draw_figure(canvas, scene.camera, scene.affine[t], near, t)
        else:
            render.draw_figure(canvas, scene.camera, scene.affine[t], near, t)
            _draw_ball(canvas, scene, t)
        yield render.develop(canvas, scene.look, light, rng)


def figure_mask(scene: RallyScene, t: int, parameters: DemoParameters, *, person: int = 0) -> np.ndarray:
    """Where a player is drawn in frame t, racket included: bool (H, W)."""
    white = (255.0, 255.0, 255.0)
    drawn = scene.players[person]
    outfit = render.Outfit(**{**dict.fromkeys(render.Outfit.__dataclass_fields__, white), "sleeve": 0.5})
    canvas = render.Canvas.blank(parameters.frame_size)
    render.draw_figure(
        canvas, scene.camera, scene.affine[t], render.Drawn(drawn.figure, outfit, drawn.height, drawn.build), t
    )
    return canvas.reduced()[..., 0] > 60
