"""Parametric tennis strokes of the demo dataset: key poses per stroke, smooth timing, COCO-17 joints in metres.

World axes: x to the right, y to the net (seen from the near baseline), z up; metres. Times are frames. A pose is one
row of numbers (`FIELDS`) in body heights and degrees; hands are relative to the middle of the shoulders, feet and
pelvis to the point on the ground under the player. Limbs are solved by two-bone inverse kinematics, so bone lengths
hold whatever a key pose asks for.

``S`` is the number of strokes of a rally, ``T`` of its frames.
"""

from dataclasses import dataclass

import numpy as np

# name -> number of values in a pose row
FIELDS: dict[str, int] = {
    "rh": 3,  # right hand (x, y, z)
    "lh": 3,  # left hand
    "rd": 3,  # direction of the racket, normalised later
    "two": 1,  # 1: the left hand holds the racket above the right one
    "sy": 1,  # turn of the shoulders, degrees, positive = right shoulder back
    "hy": 1,  # turn of the hips
    "lean": 1,  # torso forward
    "side": 1,  # torso to the right
    "crouch": 1,  # how much lower the pelvis is
    "hop": 1,  # how high both feet are off the ground
    "p": 2,  # shift of the pelvis (x, y)
    "rf": 3,  # right foot
    "lf": 3,  # left foot
}
_SLICES: dict[str, slice] = {}
_offset = 0
for _name, _width in FIELDS.items():
    _SLICES[_name] = slice(_offset, _offset + _width)
    _offset += _width
POSE_SIZE = _offset


def _row(base: np.ndarray, **values: float | tuple[float, ...]) -> np.ndarray:
    row = base.copy()
    for name, value in values.items():
        row[_SLICES[name]] = value
    return row


READY = _row(
    np.zeros(POSE_SIZE),
    rh=(0.07, 0.22, -0.20), lh=(-0.06, 0.25, -0.16), rd=(-0.35, 0.45, 0.8), lean=14, crouch=0.05,
    rf=(0.13, 0.0, 0.0), lf=(-0.13, 0.0, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Stroke:
    """One class of stroke.

    Attributes:
        name: short name of the class.
        fields: (type, side, technique, direction), four of the eight fields of an F3Set label; they identify the class.
        keys: (time in frames relative to the contact, pose) in ascending order; before and after, the player is ready.
    """

    name: str
    fields: tuple[str, str, str, str]
    keys: tuple[tuple[float, dict[str, float | tuple[float, ...]]], ...]

    def times(self) -> np.ndarray:
        return np.array([time for time, _ in self.keys])

    def poses(self) -> np.ndarray:
        """Key poses ``(K, POSE_SIZE)``; a field that a key leaves out has the ready pose's value."""
        return np.stack([_row(READY, **pose) for _, pose in self.keys])


# fmt: off
STROKES: tuple[Stroke, ...] = (
    # Flat serve down the middle: sideways stance, deep knee bend, jump, racket across the body to the left hip.
    Stroke("serve T", ("serve", "-", "-", "T"), (
        (-4.2, dict(rh=(.10, .14, -.14), lh=(.02, .22, -.12), rd=(-.1, .8, .5), sy=50, hy=40, lean=4, crouch=.02,
                    rf=(.07, -.16, 0), lf=(-.05, .12, 0))),
        (-2.4, dict(rh=(.25, -.12, .06), lh=(-.06, .14, .32), rd=(-.1, -.1, 1), sy=65, hy=45, lean=-10, side=-8,
                    crouch=.13, rf=(.07, -.14, 0), lf=(-.05, .12, 0))),
        (-1.0, dict(rh=(.18, -.14, .16), lh=(-.14, .16, .14), rd=(.1, -.35, -.9), sy=30, hy=15, lean=-4, side=-8,
                    crouch=.03, rf=(.08, -.08, 0), lf=(-.06, .12, 0))),
        (0.0, dict(rh=(.06, .10, .42), lh=(-.14, .12, -.12), rd=(-.12, .2, 1), sy=-10, hy=-5, lean=12, side=-12,
                   crouch=-.02, hop=.07, rf=(.10, -.14, .03), lf=(-.07, .14, 0))),
        (1.3, dict(rh=(-.12, .27, -.10), lh=(-.17, .06, -.16), rd=(-.35, .5, -.8), sy=-48, hy=-30, lean=30,
                   rf=(.10, -.12, .06), lf=(-.07, .20, 0), p=(0, .05))),
        (2.7, dict(rh=(-.28, .10, -.30), lh=(-.20, .02, -.12), rd=(-.6, -.2, -.75), sy=-62, hy=-40, lean=26,
                   crouch=.08, rf=(.12, .20, 0), lf=(-.08, .12, 0), p=(0, .08))),
    )),
    # Sliced serve out wide: feet together, toss and contact far right, torso leaning right, racket stays on the right.
    Stroke("serve W", ("serve", "-", "-", "W"), (
        (-4.2, dict(rh=(.16, .10, -.24), lh=(.10, .20, -.20), rd=(.5, .6, -.4), sy=85, hy=75, lean=8, crouch=.02,
                    rf=(.10, -.10, 0), lf=(.02, .14, 0))),
        (-2.4, dict(rh=(.32, -.04, -.04), lh=(.14, .10, .31), rd=(.5, -.2, .9), sy=88, hy=70, lean=0, side=4,
                    crouch=.07, rf=(.06, .04, 0), lf=(.02, .14, 0))),
        (-1.0, dict(rh=(.26, -.10, .12), lh=(.04, .14, .10), rd=(.5, -.3, -.8), sy=55, hy=45, side=10,
                    crouch=.03, rf=(.06, .04, 0), lf=(.02, .14, 0))),
        (0.0, dict(rh=(.28, .06, .34), lh=(-.10, .12, -.10), rd=(.45, .2, .9), sy=25, hy=25, lean=6, side=18,
                   crouch=-.01, rf=(.08, .02, 0), lf=(.0, .14, 0), p=(.04, 0))),
        (1.3, dict(rh=(.32, .22, -.10), lh=(-.12, .14, -.14), rd=(.6, .6, -.5), sy=0, hy=10, lean=16, side=14,
                   rf=(.16, .06, 0), lf=(.0, .10, 0), p=(.08, .02))),
        (2.7, dict(rh=(.24, .02, -.32), lh=(-.08, .18, -.16), rd=(.5, -.4, -.8), sy=-8, hy=0, lean=18, side=8,
                   crouch=.05, rf=(.26, .10, 0), lf=(.04, .04, 0), p=(.10, .03))),
    )),
    # Topspin forehand cross-court: open stance, contact in front, racket wraps around the left shoulder.
    Stroke("forehand CC", ("stroke", "fh", "gs", "CC"), (
        (-2.5, dict(rh=(.32, -.16, -.06), lh=(.14, .22, -.06), rd=(.3, -.6, .8), sy=72, hy=40, crouch=.09,
                    rf=(.22, -.04, 0), lf=(-.16, .04, 0), p=(.03, 0))),
        (-1.0, dict(rh=(.34, -.10, -.29), lh=(.0, .26, -.12), rd=(.5, -.7, -.4), sy=42, hy=10, crouch=.10,
                    rf=(.22, -.04, 0), lf=(-.16, .04, 0), p=(.03, 0))),
        (0.0, dict(rh=(.26, .22, -.20), lh=(-.16, .14, -.14), rd=(.85, .45, -.1), sy=-8, hy=-15, crouch=.07,
                   rf=(.22, -.02, 0), lf=(-.16, .02, 0), p=(.02, 0))),
        (1.2, dict(rh=(-.04, .30, .04), lh=(-.20, .10, -.08), rd=(-.4, .6, .5), sy=-52, hy=-38, crouch=.04,
                   rf=(.20, .06, .03), lf=(-.16, 0, 0))),
        (2.6, dict(rh=(-.25, .06, .07), lh=(-.18, .16, .0), rd=(-.6, -.6, .3), sy=-78, hy=-50, crouch=.04, lean=6,
                   rf=(.17, .14, 0), lf=(-.15, -.02, 0))),
    )),
    # Forehand down the line: high loop, left foot steps in, contact late at the side, lasso finish above the head.
    Stroke("forehand DL", ("stroke", "fh", "gs", "DL"), (
        (-2.5, dict(rh=(.26, -.22, .14), lh=(.20, .16, .0), rd=(.1, -.3, 1), sy=98, hy=75, crouch=.05,
                    rf=(.10, -.10, 0), lf=(.02, .22, .02))),
        (-1.0, dict(rh=(.38, -.14, -.20), lh=(.10, .22, -.06), rd=(.5, -.8, .0), sy=75, hy=60, crouch=.08,
                    rf=(.10, -.10, 0), lf=(.06, .24, 0))),
        (0.0, dict(rh=(.36, .08, -.12), lh=(-.08, .20, -.04), rd=(.95, .1, .1), sy=32, hy=30, crouch=.07,
                   rf=(.12, -.10, 0), lf=(.06, .24, 0))),
        (1.2, dict(rh=(.27, .22, .16), lh=(-.16, .18, .0), rd=(.3, .5, .9), sy=12, hy=14, crouch=.03, lean=6,
                   rf=(.14, -.06, .02), lf=(.02, .20, 0))),
        (2.6, dict(rh=(.18, .06, .32), lh=(-.18, .16, -.06), rd=(-.6, -.6, .5), sy=0, hy=6, crouch=.02, lean=0,
                   rf=(.16, .0, 0), lf=(-.04, .12, 0))),
    )),
    # Forehand slice: racket high behind, chop forward and down, long lunge, finish low in front.
    Stroke("forehand slice", ("stroke", "fh", "slice", "DM"), (
        (-2.4, dict(rh=(.28, -.06, .20), lh=(.08, .24, .02), rd=(.1, -.3, 1), sy=58, hy=40, crouch=.08,
                    rf=(.12, -.10, 0), lf=(-.02, .14, .04))),
        (-1.0, dict(rh=(.33, .02, .08), lh=(.0, .24, -.02), rd=(.4, -.3, .85), sy=45, hy=35, crouch=.13, lean=20,
                    rf=(.12, -.16, 0), lf=(.02, .28, 0))),
        (0.0, dict(rh=(.30, .20, -.20), lh=(-.16, .06, -.02), rd=(.85, .35, .2), sy=25, hy=30, crouch=.16, lean=26,
                   rf=(.12, -.18, 0), lf=(.03, .30, 0), p=(.02, .04))),
        (1.3, dict(rh=(.14, .32, -.36), lh=(-.26, -.06, .02), rd=(.5, .8, -.3), sy=5, hy=20, crouch=.17, lean=30,
                   rf=(.12, -.18, 0), lf=(.03, .30, 0), p=(.02, .05))),
        (2.7, dict(rh=(-.04, .33, -.32), lh=(-.28, -.04, .04), rd=(-.1, .9, .1), sy=-10, hy=8, crouch=.12, lean=24,
                   rf=(.12, -.14, 0), lf=(.0, .26, 0), p=(.01, .03))),
    )),
    # Forehand volley: hop, short block at head height, left foot across, no follow-through.
    Stroke("forehand volley", ("stroke", "fh", "volley", "CC"), (
        (-3.4, dict(rh=(.10, .24, -.10), lh=(-.08, .26, -.08), hop=.08, crouch=.03, rf=(.18, 0, 0), lf=(-.18, 0, 0))),
        (-1.8, dict(rh=(.28, .10, .06), lh=(-.02, .28, .0), rd=(.35, -.1, .95), sy=34, hy=20, crouch=.10,
                    rf=(.18, .0, 0), lf=(-.16, .04, 0))),
        (0.0, dict(rh=(.28, .28, .02), lh=(-.18, .22, .0), rd=(.45, .35, .85), sy=16, hy=22, crouch=.12, lean=20,
                   rf=(.16, -.10, 0), lf=(.12, .28, 0), p=(.06, .06))),
        (1.4, dict(rh=(.20, .32, -.08), lh=(-.20, .20, .0), rd=(.4, .5, .7), sy=8, hy=18, crouch=.12, lean=20,
                   rf=(.16, -.10, 0), lf=(.12, .28, 0), p=(.06, .06))),
        (2.8, dict(rh=(.10, .24, -.12), lh=(-.08, .26, -.08), crouch=.05, rf=(.16, .04, 0), lf=(-.06, .14, 0),
                   p=(.03, .05))),
    )),
    # Forehand lob: racket low under the ball, body rises with it, finish straight up on the right.
    Stroke("forehand lob", ("stroke", "fh", "lob", "DM"), (
        (-2.4, dict(rh=(.27, -.12, -.31), lh=(.04, .26, -.10), rd=(.4, -.5, -.7), sy=44, hy=26, crouch=.15,
                    rf=(.20, -.04, 0), lf=(-.14, .06, 0), lean=22)),
        (-1.0, dict(rh=(.30, .02, -.34), lh=(-.02, .28, -.10), rd=(.6, -.1, -.8), sy=28, hy=16, crouch=.18,
                    rf=(.20, -.04, 0), lf=(-.14, .06, 0), lean=24)),
        (0.0, dict(rh=(.25, .22, -.27), lh=(-.10, .28, -.06), rd=(.7, .5, -.5), sy=8, hy=4, crouch=.14, lean=16,
                   rf=(.20, -.04, 0), lf=(-.14, .06, 0))),
        (1.2, dict(rh=(.20, .24, .16), lh=(-.20, .18, .06), rd=(.2, .3, .95), sy=-2, hy=0, crouch=.03, lean=2,
                   rf=(.18, -.04, .02), lf=(-.13, .04, 0))),
        (2.6, dict(rh=(.15, .10, .36), lh=(-.22, .16, .14), rd=(.1, -.3, 1), sy=0, hy=0, crouch=-.01, lean=-4,
                   rf=(.16, -.04, 0), lf=(-.13, .02, 0))),
    )),
    # Two-handed topspin backhand: both hands on the racket, right foot steps in, finish over the right shoulder.
    Stroke("backhand CC", ("stroke", "bh", "gs", "CC"), (
        (-2.5, dict(rh=(-.24, -.06, -.06), two=1, rd=(-.5, -.6, .6), sy=-84, hy=-55, crouch=.08,
                    rf=(.06, .16, 0), lf=(-.16, -.06, 0))),
        (-1.0, dict(rh=(-.28, .0, -.27), two=1, rd=(-.6, -.7, -.3), sy=-55, hy=-40, crouch=.11,
                    rf=(.0, .24, 0), lf=(-.16, -.08, 0))),
        (0.0, dict(rh=(-.18, .25, -.19), two=1, rd=(-.9, .35, -.1), sy=-14, hy=-22, crouch=.08,
                   rf=(.0, .24, 0), lf=(-.16, -.08, 0))),
        (1.2, dict(rh=(.08, .28, .04), two=1, rd=(.3, .6, .6), sy=36, hy=10, crouch=.04, lean=8,
                   rf=(.04, .20, 0), lf=(-.15, -.04, .02))),
        (2.6, dict(rh=(.25, .08, .10), two=1, rd=(.5, -.6, .4), sy=72, hy=38, crouch=.03, lean=4,
                   rf=(.10, .12, 0), lf=(-.14, .06, 0))),
    )),
    # One-handed backhand slice: racket above the left shoulder, arms open like wings, lunge with the right foot.
    Stroke("backhand slice", ("stroke", "bh", "slice", "CC"), (
        (-2.4, dict(rh=(-.20, .06, .18), lh=(-.22, -.02, .18), rd=(-.3, -.5, .8), sy=-90, hy=-60, crouch=.06,
                    rf=(.06, .16, .04), lf=(-.14, -.08, 0))),
        (-1.0, dict(rh=(-.26, .14, .05), lh=(-.24, -.04, .10), rd=(-.7, -.4, .6), sy=-72, hy=-55, crouch=.11, lean=20,
                    rf=(.0, .30, 0), lf=(-.14, -.14, 0))),
        (0.0, dict(rh=(-.20, .28, -.18), lh=(-.27, -.14, -.02), rd=(-.9, .3, .2), sy=-48, hy=-48, crouch=.14, lean=24,
                   rf=(.0, .32, 0), lf=(-.14, -.16, 0), p=(-.02, .05))),
        (1.3, dict(rh=(.08, .34, -.22), lh=(-.32, -.18, .0), rd=(-.1, .95, -.1), sy=-36, hy=-40, crouch=.13, lean=20,
                   rf=(.0, .32, 0), lf=(-.14, -.16, 0), p=(-.02, .05))),
        (2.7, dict(rh=(.30, .20, -.02), lh=(-.33, -.18, .05), rd=(.5, .7, .3), sy=-22, hy=-25, crouch=.09, lean=14,
                   rf=(.02, .28, 0), lf=(-.14, -.10, 0), p=(-.01, .04))),
    )),
    # Backhand volley: hop, racket across at head height, right foot across to the left, short punch.
    Stroke("backhand volley", ("stroke", "bh", "volley", "DL"), (
        (-3.4, dict(rh=(.06, .24, -.10), lh=(-.08, .26, -.06), hop=.08, crouch=.03, rf=(.18, 0, 0), lf=(-.18, 0, 0))),
        (-1.8, dict(rh=(-.14, .16, .05), lh=(-.22, .12, .10), rd=(-.45, -.1, .9), sy=-38, hy=-22, crouch=.10,
                    rf=(.16, .04, 0), lf=(-.18, .0, 0))),
        (0.0, dict(rh=(-.22, .29, .02), lh=(-.28, .04, .02), rd=(-.55, .3, .8), sy=-26, hy=-26, crouch=.12, lean=20,
                   rf=(-.12, .30, 0), lf=(-.16, -.10, 0), p=(-.06, .06))),
        (1.4, dict(rh=(-.10, .34, -.08), lh=(-.28, .0, -.04), rd=(-.35, .6, .6), sy=-18, hy=-22, crouch=.12, lean=20,
                   rf=(-.12, .30, 0), lf=(-.16, -.10, 0), p=(-.06, .06))),
        (2.8, dict(rh=(.04, .25, -.12), lh=(-.10, .24, -.08), crouch=.05, rf=(.06, .14, 0), lf=(-.16, .02, 0),
                   p=(-.03, .05))),
    )),
    # Two-handed backhand lob: low, then straight up in front of the body.
    Stroke("backhand lob", ("stroke", "bh", "lob", "DM"), (
        (-2.4, dict(rh=(-.20, .04, -.31), two=1, rd=(-.6, -.4, -.6), sy=-54, hy=-34, crouch=.15, lean=22,
                    rf=(.12, .06, 0), lf=(-.20, -.04, 0))),
        (-1.0, dict(rh=(-.20, .16, -.32), two=1, rd=(-.7, .0, -.75), sy=-36, hy=-24, crouch=.18, lean=24,
                    rf=(.12, .06, 0), lf=(-.20, -.04, 0))),
        (0.0, dict(rh=(-.14, .27, -.24), two=1, rd=(-.75, .5, -.4), sy=-18, hy=-12, crouch=.13, lean=16,
                   rf=(.12, .06, 0), lf=(-.20, -.04, 0))),
        (1.2, dict(rh=(-.06, .24, .12), two=1, rd=(-.1, .3, .95), sy=-4, hy=-4, crouch=.03, lean=2,
                   rf=(.12, .04, 0), lf=(-.18, -.02, .02))),
        (2.6, dict(rh=(.0, .14, .28), two=1, rd=(.1, -.3, 1), sy=2, hy=0, crouch=-.01, lean=-4,
                   rf=(.12, .02, 0), lf=(-.16, .0, 0))),
    )),
    # Smash: shuffle back sideways, left arm points up, scissor jump, short snap in front.
    Stroke("smash", ("stroke", "fh", "smash", "CC"), (
        (-3.4, dict(rh=(.20, .02, .10), lh=(-.10, .22, .12), rd=(.1, -.1, 1), sy=55, hy=55, lean=-4, crouch=.05,
                    rf=(.14, -.22, .03), lf=(-.04, .02, 0), p=(0, -.06))),
        (-1.6, dict(rh=(.24, -.10, .14), lh=(-.06, .12, .34), rd=(.05, -.35, .9), sy=75, hy=60, lean=-12, crouch=.10,
                    rf=(.10, -.24, 0), lf=(-.04, .04, .03), p=(0, -.10))),
        (0.0, dict(rh=(.14, .10, .40), lh=(-.20, .16, .06), rd=(.1, .2, 1), sy=5, hy=-15, lean=4, crouch=-.02, hop=.13,
                   rf=(.12, .16, .08), lf=(-.10, -.22, .05), p=(0, -.10))),
        (1.2, dict(rh=(.08, .32, .06), lh=(-.22, .10, -.06), rd=(.0, .8, -.5), sy=-28, hy=-25, lean=18, hop=.02,
                   rf=(.12, .16, 0), lf=(-.10, -.18, .04), p=(0, -.08))),
        (2.7, dict(rh=(.0, .24, -.16), lh=(-.12, .22, -.12), rd=(-.2, .8, .3), sy=-10, hy=-6, lean=14, crouch=.07,
                   rf=(.12, .06, 0), lf=(-.12, -.04, 0), p=(0, -.03))),
    )),
)
# fmt: on


@dataclass(frozen=True)
class Body:
    """Proportions and habits of one player. Lengths in body heights, `height` in metres, `build` scales thickness."""

    height: float
    shoulder: float
    hip: float
    upper_arm: float
    forearm: float
    thigh: float
    shin: float
    spine: float
    build: float
    amplitude: float  # scales how far a stroke leaves the ready pose
    tempo: float  # scales the times of the key poses
    habits: np.ndarray  # (number of strokes, POSE_SIZE) constant offsets of this player's poses


_SPREAD = {
    "rh": 0.022, "lh": 0.03, "rd": 0.12, "two": 0.0, "sy": 7.0, "hy": 6.0, "lean": 3.5, "side": 3.0, "crouch": 0.012,
    "hop": 0.0, "p": 0.012, "rf": 0.018, "lf": 0.018,
}  # fmt: skip
SPREAD = np.concatenate([np.full(width, _SPREAD[name]) for name, width in FIELDS.items()])
for _name in ("rf", "lf"):  # feet are on the ground or where the pose says
    SPREAD[_SLICES[_name]][2] = 0.0


def random_body(rng: np.random.Generator) -> Body:
    """A player of 1.66 to 1.92 m with own proportions, amplitude, tempo and habits per stroke."""

    def vary(value: float, share: float) -> float:
        return float(value * rng.uniform(1 - share, 1 + share))

    return Body(
        height=float(rng.uniform(1.66, 1.92)),
        shoulder=vary(0.118, 0.10),
        hip=vary(0.072, 0.10),
        upper_arm=vary(0.176, 0.05),
        forearm=vary(0.158, 0.05),
        thigh=vary(0.242, 0.03),
        shin=vary(0.243, 0.03),
        spine=vary(0.285, 0.04),
        build=vary(1.0, 0.16),
        amplitude=vary(1.0, 0.10),
        tempo=vary(1.0, 0.08),
        habits=0.6 * SPREAD * rng.standard_normal((len(STROKES), POSE_SIZE)),
    )


def _stroke_keys(stroke: int, body: Body, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Key times (K,) relative to the contact and poses (K, POSE_SIZE) of one execution of a stroke."""
    times, poses = STROKES[stroke].times(), STROKES[stroke].poses()
    amplitude = body.amplitude * rng.uniform(0.92, 1.08)
    poses = READY + (poses - READY) * np.where(SPREAD > 0, amplitude, 1.0)
    # One offset for the whole execution, a smaller one for each key: executions differ, but stay smooth.
    poses = poses + body.habits[stroke] + SPREAD * (0.6 * rng.standard_normal(POSE_SIZE))
    poses = poses + 0.35 * SPREAD * rng.standard_normal(poses.shape)
    times = times * body.tempo * rng.uniform(0.95, 1.05) + rng.uniform(-0.12, 0.12, len(times)) * (times != 0)
    return times + rng.uniform(-0.25, 0.25), poses


def _interpolate(times: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Cubic Hermite interpolation with finite-difference tangents (Catmull-Rom on uneven times).

    Args:
        times: (K,) ascending; values: (K, D); at: (T,), clamped to the ends.

    Returns:
        (T, D).
    """
    slopes = np.diff(values, axis=0) / np.diff(times)[:, None]
    tangents = np.concatenate([np.zeros_like(slopes[:1]), 0.5 * (slopes[1:] + slopes[:-1]), np.zeros_like(slopes[:1])])
    at = np.clip(at, times[0], times[-1])
    i = np.clip(np.searchsorted(times, at, side="right") - 1, 0, len(times) - 2)
    width = (times[i + 1] - times[i])[:, None]
    u = (at - times[i])[:, None] / width
    return (
        (1 + 2 * u) * (1 - u) ** 2 * values[i]
        + u * (1 - u) ** 2 * width * tangents[i]
        + u**2 * (3 - 2 * u) * values[i + 1]
        + u**2 * (u - 1) * width * tangents[i + 1]
    )


def pose_track(
    strokes: list[int], contacts: list[float], num_frames: int, body: Body, rng: np.random.Generator
) -> np.ndarray:
    """Poses of a rally.

    Args:
        strokes: S indices into `STROKES`; contacts: S frames of the contacts, ascending.
        num_frames: T.
        body: the player.
        rng: timing jitter and variation of each execution.

    Returns:
        (T, POSE_SIZE).
    """
    times, poses = [-3.0], [READY]
    for stroke, contact in zip(strokes, contacts, strict=True):
        keys, rows = _stroke_keys(stroke, body, rng)
        keys = keys + contact
        # Too close to the stroke before: its last keys give way.
        while times[-1] > keys[0] - 0.9:
            times.pop(), poses.pop()
        # Back to ready between the strokes where there is time for it.
        middle = 0.5 * (times[-1] + keys[0])
        if keys[0] - times[-1] > 2.4:
            times.append(middle), poses.append(READY + 0.3 * SPREAD * rng.standard_normal(POSE_SIZE))
        times.extend(keys), poses.extend(rows)
    times.append(times[-1] + 2.2), poses.append(READY)
    return _interpolate(np.array(times), np.stack(poses), np.arange(num_frames, dtype=np.float64))


def walk_track(
    contacts: list[float], num_frames: int, reach: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sideways position of a player who shuffles to a new place for each stroke.

    Returns:
        x (T,) in metres within +-`reach`, and speed (T,) in metres per frame.
    """
    times, places = [-3.0], [rng.uniform(-reach, reach)]
    for contact in contacts:
        if contact - 1.5 > times[-1] + 1.0:
            times.append(contact - 1.5), places.append(rng.uniform(-reach, reach))
        times.append(contact + 1.8), places.append(places[-1])
    x = _interpolate(np.array(times), np.array(places)[:, None], np.arange(num_frames, dtype=np.float64))[:, 0]
    return x, np.gradient(x)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)


def _two_bones(
    start: np.ndarray, end: np.ndarray, first: float, second: float, pole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Middle joint and reached end of a two-bone chain that bends towards `pole`; all (T, 3)."""
    axis = end - start
    length = np.linalg.norm(axis, axis=-1, keepdims=True)
    axis = axis / np.maximum(length, 1e-6)
    length = np.clip(length, abs(first - second) + 1e-3, (first + second) * 0.998)
    along = (first**2 - second**2 + length**2) / (2 * length)
    away = np.sqrt(np.maximum(first**2 - along**2, 0.0))
    bend = _unit(pole - axis * np.sum(pole * axis, axis=-1, keepdims=True))
    return start + axis * along + bend * away, start + axis * length


@dataclass(frozen=True)
class Figure:
    """A moving player in the world: COCO-17 `joints` (T, 17, 3), racket grip (T, 3), direction and face normal (T, 3),
    head centre (T, 3), horizontal direction of the chest (T, 3), ground point (T, 3). Metres."""

    joints: np.ndarray
    grip: np.ndarray
    racket: np.ndarray
    normal: np.ndarray
    head: np.ndarray
    chest: np.ndarray
    ground: np.ndarray


def _yaw(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Directions "right" and "forward" (T, 3) of a body part turned to its right by `degrees` (T,)."""
    a = np.radians(degrees)
    zero = np.zeros_like(a)
    return np.stack([np.cos(a), -np.sin(a), zero], -1), np.stack([np.sin(a), np.cos(a), zero], -1)


def _head_joints(
    neck: np.ndarray, turn: np.ndarray, lean: np.ndarray, size: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    right, forward = _yaw(turn)
    centre = neck + size * (np.array([0, 0, 1.75]) + 0.35 * forward * np.sin(np.radians(lean))[:, None] * 2)
    up = np.array([0.0, 0.0, 1.0])
    nose = centre + size * (0.95 * forward - 0.1 * up)
    eyes = [centre + size * (0.8 * forward + s * 0.38 * right + 0.2 * up) for s in (-1, 1)]
    ears = [centre + size * (0.9 * s * right) for s in (-1, 1)]
    return centre, [nose, *eyes, *ears]


def solve(pose: np.ndarray, x: np.ndarray, speed: np.ndarray, y: float, body: Body, *, facing: int) -> Figure:
    """Joints of a pose track.

    Args:
        pose: (T, POSE_SIZE); x, speed: (T,) from `walk_track`; y: metres from the near baseline.
        facing: 1 looks to +y (near player), -1 looks to -y (far player; left and right are swapped in the picture).
    """
    h = body.height
    get = {name: pose[:, part] for name, part in _SLICES.items()}
    hop = np.maximum(get["hop"], 0)
    lift = np.concatenate([np.zeros((len(x), 2)), hop], -1)
    # A shuffling player lifts one foot after the other.
    phase = np.cumsum(np.abs(speed)) / h * 9.0
    step = np.minimum(np.abs(speed) / h * 1.2, 0.07)
    shuffle = [np.maximum(np.sin(phase * np.pi + k * np.pi), 0) * step for k in (0, 1)]

    pelvis_z = 0.525 - np.maximum(get["crouch"], -0.03)
    pelvis = np.concatenate([get["p"], pelvis_z], -1) + lift
    lean, side = np.radians(get["lean"]), np.radians(get["side"])
    spine = _unit(np.concatenate([np.tan(side), np.tan(lean), np.ones_like(lean)], -1))
    chest = pelvis + body.spine * spine
    right_s, forward_s = _yaw(get["sy"][:, 0])
    right_h, forward_h = _yaw(get["hy"][:, 0])
    shoulders = [chest + s * body.shoulder * right_s for s in (-1, 1)]
    hips = [pelvis + s * body.hip * right_h for s in (-1, 1)]

    racket = _unit(get["rd"])
    pole_r = right_s * 0.6 - 0.35 * forward_s + np.array([0, 0, -0.75])
    elbow_r, wrist_r = _two_bones(shoulders[1], chest + get["rh"], body.upper_arm, body.forearm, pole_r)
    grip = wrist_r + 0.045 * _unit(_unit(wrist_r - elbow_r) + racket)
    two = np.clip(get["two"], 0, 1)
    goal_l = (1 - two) * (chest + get["lh"]) + two * (grip + 0.06 * racket)
    pole_l = -right_s * 0.6 - 0.35 * forward_s + np.array([0, 0, -0.75])
    elbow_l, wrist_l = _two_bones(shoulders[0], goal_l, body.upper_arm, body.forearm, pole_l)

    legs = []
    for k, (name, hip) in enumerate((("lf", hips[0]), ("rf", hips[1]))):
        ankle = get[name] * np.array([1, 1, 0])
        ankle[:, 2] = 0.04 + np.maximum(get[name][:, 2], 0) + shuffle[k] + hop[:, 0]
        legs.append(_two_bones(hip, ankle, body.thigh, body.shin, forward_h + 0.25 * (2 * k - 1) * right_h))
    head, face = _head_joints(chest, 0.35 * get["sy"][:, 0], get["lean"][:, 0], 0.068)

    joints = [*face, *shoulders, elbow_l, elbow_r, wrist_l, wrist_r, *hips]
    joints += [legs[0][0], legs[1][0], legs[0][1], legs[1][1]]
    normal = forward_s + np.array([0, 0, 0.15])
    normal = _unit(normal - racket * np.sum(normal * racket, -1, keepdims=True))

    turn = np.array([facing, facing, 1.0])
    ground = np.stack([x, np.full_like(x, y), np.zeros_like(x)], -1)

    def place(v: np.ndarray) -> np.ndarray:
        return v * h * turn + ground

    return Figure(
        joints=np.stack([place(joint) for joint in joints], 1),
        grip=place(grip),
        racket=racket * turn,
        normal=normal * turn,
        head=place(head),
        chest=forward_s * turn,
        ground=ground + np.concatenate([get["p"] * h * facing, np.zeros((len(x), 1))], -1),
    )
