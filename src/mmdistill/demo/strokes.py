"""Stroke classes of the demo dataset, defined by key poses.

A pose is one row of numbers (`FIELDS`) in body heights and degrees. x points to the right, y to the net, z up. Hand
positions are relative to the center of the shoulders, feet and pelvis to the point on the ground below the player.
Times are in frames relative to the contact with the ball.
"""

from dataclasses import dataclass

import numpy as np

# name -> number of values in a pose row
FIELDS: dict[str, int] = {
    "rh": 3,  # right hand (x, y, z)
    "lh": 3,  # left hand
    "rd": 3,  # direction of the racket, normalized later
    "two": 1,  # 1: the left hand also holds the racket, above the right hand
    "sy": 1,  # shoulder rotation, degrees; positive: right shoulder back
    "hy": 1,  # hip rotation, degrees
    "lean": 1,  # forward tilt of the torso, degrees
    "side": 1,  # tilt of the torso to the right, degrees
    "crouch": 1,  # lowering of the pelvis
    "hop": 1,  # height of both feet above the ground
    "p": 2,  # horizontal shift of the pelvis (x, y)
    "rf": 3,  # right foot
    "lf": 3,  # left foot
}
SLICES: dict[str, slice] = {}
_offset = 0
for _name, _width in FIELDS.items():
    SLICES[_name] = slice(_offset, _offset + _width)
    _offset += _width
POSE_SIZE = _offset


Value = float | tuple[float, ...]


def _key(time: float, **pose: Value) -> tuple[float, dict[str, Value]]:
    return time, pose


def _set_fields(base: np.ndarray, **values: Value) -> np.ndarray:
    row = base.copy()
    for name, value in values.items():
        row[SLICES[name]] = value
    return row


READY = _set_fields(
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
        keys: (time in frames relative to the contact, pose), ascending. Before and after, the player is in the ready
            pose.
    """

    name: str
    fields: tuple[str, str, str, str]
    keys: tuple[tuple[float, dict[str, Value]], ...]

    def times(self) -> np.ndarray:
        """Times of the key poses (K,), in frames relative to the contact."""
        return np.array([time for time, _ in self.keys])

    def poses(self) -> np.ndarray:
        """Key poses (K, POSE_SIZE). A field that a key does not set has its value in the ready pose."""
        return np.stack([_set_fields(READY, **pose) for _, pose in self.keys])


# fmt: off
STROKES: tuple[Stroke, ...] = (
    # Flat serve down the middle: sideways stance, deep knee bend, jump, racket across the body to the left hip.
    Stroke("serve T", ("serve", "-", "-", "T"), (
        _key(-4.2, rh=(.10, .14, -.14), lh=(.02, .22, -.12), rd=(-.1, .8, .5), sy=50, hy=40, lean=4, crouch=.02,
            rf=(.07, -.16, 0), lf=(-.05, .12, 0)),
        _key(-2.4, rh=(.25, -.12, .06), lh=(-.06, .14, .32), rd=(-.1, -.1, 1), sy=65, hy=45, lean=-10, side=-8,
            crouch=.13, rf=(.07, -.14, 0), lf=(-.05, .12, 0)),
        _key(-1.0, rh=(.18, -.14, .16), lh=(-.14, .16, .14), rd=(.1, -.35, -.9), sy=30, hy=15, lean=-4, side=-8,
            crouch=.03, rf=(.08, -.08, 0), lf=(-.06, .12, 0)),
        _key(0.0, rh=(.06, .10, .42), lh=(-.14, .12, -.12), rd=(-.12, .2, 1), sy=-10, hy=-5, lean=12, side=-12,
            crouch=-.02, hop=.07, rf=(.10, -.14, .03), lf=(-.07, .14, 0)),
        _key(1.3, rh=(-.12, .27, -.10), lh=(-.17, .06, -.16), rd=(-.35, .5, -.8), sy=-48, hy=-30, lean=30,
            rf=(.10, -.12, .06), lf=(-.07, .20, 0), p=(0, .05)),
        _key(2.7, rh=(-.28, .10, -.30), lh=(-.20, .02, -.12), rd=(-.6, -.2, -.75), sy=-62, hy=-40, lean=26,
            crouch=.08, rf=(.12, .20, 0), lf=(-.08, .12, 0), p=(0, .08)),
    )),
    # Sliced serve out wide: feet together, toss and contact far right, torso leaning right, racket stays on the right.
    Stroke("serve W", ("serve", "-", "-", "W"), (
        _key(-4.2, rh=(.16, .10, -.24), lh=(.10, .20, -.20), rd=(.5, .6, -.4), sy=85, hy=75, lean=8, crouch=.02,
            rf=(.10, -.10, 0), lf=(.02, .14, 0)),
        _key(-2.4, rh=(.32, -.04, -.04), lh=(.14, .10, .31), rd=(.5, -.2, .9), sy=88, hy=70, lean=0, side=4,
            crouch=.07, rf=(.06, .04, 0), lf=(.02, .14, 0)),
        _key(-1.0, rh=(.26, -.10, .12), lh=(.04, .14, .10), rd=(.5, -.3, -.8), sy=55, hy=45, side=10,
            crouch=.03, rf=(.06, .04, 0), lf=(.02, .14, 0)),
        _key(0.0, rh=(.28, .06, .34), lh=(-.10, .12, -.10), rd=(.45, .2, .9), sy=25, hy=25, lean=6, side=18,
            crouch=-.01, rf=(.08, .02, 0), lf=(.0, .14, 0), p=(.04, 0)),
        _key(1.3, rh=(.32, .22, -.10), lh=(-.12, .14, -.14), rd=(.6, .6, -.5), sy=0, hy=10, lean=16, side=14,
            rf=(.16, .06, 0), lf=(.0, .10, 0), p=(.08, .02)),
        _key(2.7, rh=(.24, .02, -.32), lh=(-.08, .18, -.16), rd=(.5, -.4, -.8), sy=-8, hy=0, lean=18, side=8,
            crouch=.05, rf=(.26, .10, 0), lf=(.04, .04, 0), p=(.10, .03)),
    )),
    # Topspin forehand cross-court: open stance, contact in front, racket wraps around the left shoulder.
    Stroke("forehand CC", ("stroke", "fh", "gs", "CC"), (
        _key(-2.5, rh=(.32, -.16, -.06), lh=(.14, .22, -.06), rd=(.3, -.6, .8), sy=72, hy=40, crouch=.09,
            rf=(.22, -.04, 0), lf=(-.16, .04, 0), p=(.03, 0)),
        _key(-1.0, rh=(.34, -.10, -.29), lh=(.0, .26, -.12), rd=(.5, -.7, -.4), sy=42, hy=10, crouch=.10,
            rf=(.22, -.04, 0), lf=(-.16, .04, 0), p=(.03, 0)),
        _key(0.0, rh=(.26, .22, -.20), lh=(-.16, .14, -.14), rd=(.85, .45, -.1), sy=-8, hy=-15, crouch=.07,
            rf=(.22, -.02, 0), lf=(-.16, .02, 0), p=(.02, 0)),
        _key(1.2, rh=(-.04, .30, .04), lh=(-.20, .10, -.08), rd=(-.4, .6, .5), sy=-52, hy=-38, crouch=.04,
            rf=(.20, .06, .03), lf=(-.16, 0, 0)),
        _key(2.6, rh=(-.25, .06, .07), lh=(-.18, .16, .0), rd=(-.6, -.6, .3), sy=-78, hy=-50, crouch=.04, lean=6,
            rf=(.17, .14, 0), lf=(-.15, -.02, 0)),
    )),
    # Forehand down the line: high loop, left foot steps in, contact late at the side, lasso finish above the head.
    Stroke("forehand DL", ("stroke", "fh", "gs", "DL"), (
        _key(-2.5, rh=(.26, -.22, .14), lh=(.20, .16, .0), rd=(.1, -.3, 1), sy=98, hy=75, crouch=.05,
            rf=(.10, -.10, 0), lf=(.02, .22, .02)),
        _key(-1.0, rh=(.38, -.14, -.20), lh=(.10, .22, -.06), rd=(.5, -.8, .0), sy=75, hy=60, crouch=.08,
            rf=(.10, -.10, 0), lf=(.06, .24, 0)),
        _key(0.0, rh=(.36, .08, -.12), lh=(-.08, .20, -.04), rd=(.95, .1, .1), sy=32, hy=30, crouch=.07,
            rf=(.12, -.10, 0), lf=(.06, .24, 0)),
        _key(1.2, rh=(.27, .22, .16), lh=(-.16, .18, .0), rd=(.3, .5, .9), sy=12, hy=14, crouch=.03, lean=6,
            rf=(.14, -.06, .02), lf=(.02, .20, 0)),
        _key(2.6, rh=(.18, .06, .32), lh=(-.18, .16, -.06), rd=(-.6, -.6, .5), sy=0, hy=6, crouch=.02, lean=0,
            rf=(.16, .0, 0), lf=(-.04, .12, 0)),
    )),
    # Forehand slice: racket high behind, chop forward and down, long lunge, finish low in front.
    Stroke("forehand slice", ("stroke", "fh", "slice", "DM"), (
        _key(-2.4, rh=(.28, -.06, .20), lh=(.08, .24, .02), rd=(.1, -.3, 1), sy=58, hy=40, crouch=.08,
            rf=(.12, -.10, 0), lf=(-.02, .14, .04)),
        _key(-1.0, rh=(.33, .02, .08), lh=(.0, .24, -.02), rd=(.4, -.3, .85), sy=45, hy=35, crouch=.13, lean=20,
            rf=(.12, -.16, 0), lf=(.02, .28, 0)),
        _key(0.0, rh=(.30, .20, -.20), lh=(-.16, .06, -.02), rd=(.85, .35, .2), sy=25, hy=30, crouch=.16, lean=26,
            rf=(.12, -.18, 0), lf=(.03, .30, 0), p=(.02, .04)),
        _key(1.3, rh=(.14, .32, -.36), lh=(-.26, -.06, .02), rd=(.5, .8, -.3), sy=5, hy=20, crouch=.17, lean=30,
            rf=(.12, -.18, 0), lf=(.03, .30, 0), p=(.02, .05)),
        _key(2.7, rh=(-.04, .33, -.32), lh=(-.28, -.04, .04), rd=(-.1, .9, .1), sy=-10, hy=8, crouch=.12, lean=24,
            rf=(.12, -.14, 0), lf=(.0, .26, 0), p=(.01, .03)),
    )),
    # Forehand volley: hop, short block at head height, left foot across, no follow-through.
    Stroke("forehand volley", ("stroke", "fh", "volley", "CC"), (
        _key(-3.4, rh=(.10, .24, -.10), lh=(-.08, .26, -.08), hop=.08, crouch=.03, rf=(.18, 0, 0), lf=(-.18, 0, 0)),
        _key(-1.8, rh=(.28, .10, .06), lh=(-.02, .28, .0), rd=(.35, -.1, .95), sy=34, hy=20, crouch=.10,
            rf=(.18, .0, 0), lf=(-.16, .04, 0)),
        _key(0.0, rh=(.28, .28, .02), lh=(-.18, .22, .0), rd=(.45, .35, .85), sy=16, hy=22, crouch=.12, lean=20,
            rf=(.16, -.10, 0), lf=(.12, .28, 0), p=(.06, .06)),
        _key(1.4, rh=(.20, .32, -.08), lh=(-.20, .20, .0), rd=(.4, .5, .7), sy=8, hy=18, crouch=.12, lean=20,
            rf=(.16, -.10, 0), lf=(.12, .28, 0), p=(.06, .06)),
        _key(2.8, rh=(.10, .24, -.12), lh=(-.08, .26, -.08), crouch=.05, rf=(.16, .04, 0), lf=(-.06, .14, 0),
            p=(.03, .05)),
    )),
    # Forehand lob: racket low under the ball, body rises with it, finish straight up on the right.
    Stroke("forehand lob", ("stroke", "fh", "lob", "DM"), (
        _key(-2.4, rh=(.27, -.12, -.31), lh=(.04, .26, -.10), rd=(.4, -.5, -.7), sy=44, hy=26, crouch=.15,
            rf=(.20, -.04, 0), lf=(-.14, .06, 0), lean=22),
        _key(-1.0, rh=(.30, .02, -.34), lh=(-.02, .28, -.10), rd=(.6, -.1, -.8), sy=28, hy=16, crouch=.18,
            rf=(.20, -.04, 0), lf=(-.14, .06, 0), lean=24),
        _key(0.0, rh=(.25, .22, -.27), lh=(-.10, .28, -.06), rd=(.7, .5, -.5), sy=8, hy=4, crouch=.14, lean=16,
            rf=(.20, -.04, 0), lf=(-.14, .06, 0)),
        _key(1.2, rh=(.20, .24, .16), lh=(-.20, .18, .06), rd=(.2, .3, .95), sy=-2, hy=0, crouch=.03, lean=2,
            rf=(.18, -.04, .02), lf=(-.13, .04, 0)),
        _key(2.6, rh=(.15, .10, .36), lh=(-.22, .16, .14), rd=(.1, -.3, 1), sy=0, hy=0, crouch=-.01, lean=-4,
            rf=(.16, -.04, 0), lf=(-.13, .02, 0)),
    )),
    # Two-handed topspin backhand: both hands on the racket, right foot steps in, finish over the right shoulder.
    Stroke("backhand CC", ("stroke", "bh", "gs", "CC"), (
        _key(-2.5, rh=(-.24, -.06, -.06), two=1, rd=(-.5, -.6, .6), sy=-84, hy=-55, crouch=.08,
            rf=(.06, .16, 0), lf=(-.16, -.06, 0)),
        _key(-1.0, rh=(-.28, .0, -.27), two=1, rd=(-.6, -.7, -.3), sy=-55, hy=-40, crouch=.11,
            rf=(.0, .24, 0), lf=(-.16, -.08, 0)),
        _key(0.0, rh=(-.18, .25, -.19), two=1, rd=(-.9, .35, -.1), sy=-14, hy=-22, crouch=.08,
            rf=(.0, .24, 0), lf=(-.16, -.08, 0)),
        _key(1.2, rh=(.08, .28, .04), two=1, rd=(.3, .6, .6), sy=36, hy=10, crouch=.04, lean=8,
            rf=(.04, .20, 0), lf=(-.15, -.04, .02)),
        _key(2.6, rh=(.25, .08, .10), two=1, rd=(.5, -.6, .4), sy=72, hy=38, crouch=.03, lean=4,
            rf=(.10, .12, 0), lf=(-.14, .06, 0)),
    )),
    # One-handed backhand slice: racket above the left shoulder, arms open like wings, lunge with the right foot.
    Stroke("backhand slice", ("stroke", "bh", "slice", "CC"), (
        _key(-2.4, rh=(-.20, .06, .18), lh=(-.22, -.02, .18), rd=(-.3, -.5, .8), sy=-90, hy=-60, crouch=.06,
            rf=(.06, .16, .04), lf=(-.14, -.08, 0)),
        _key(-1.0, rh=(-.26, .14, .05), lh=(-.24, -.04, .10), rd=(-.7, -.4, .6), sy=-72, hy=-55, crouch=.11, lean=20,
            rf=(.0, .30, 0), lf=(-.14, -.14, 0)),
        _key(0.0, rh=(-.20, .28, -.18), lh=(-.27, -.14, -.02), rd=(-.9, .3, .2), sy=-48, hy=-48, crouch=.14, lean=24,
            rf=(.0, .32, 0), lf=(-.14, -.16, 0), p=(-.02, .05)),
        _key(1.3, rh=(.08, .34, -.22), lh=(-.32, -.18, .0), rd=(-.1, .95, -.1), sy=-36, hy=-40, crouch=.13, lean=20,
            rf=(.0, .32, 0), lf=(-.14, -.16, 0), p=(-.02, .05)),
        _key(2.7, rh=(.30, .20, -.02), lh=(-.33, -.18, .05), rd=(.5, .7, .3), sy=-22, hy=-25, crouch=.09, lean=14,
            rf=(.02, .28, 0), lf=(-.14, -.10, 0), p=(-.01, .04)),
    )),
    # Backhand volley: hop, racket across at head height, right foot across to the left, short punch.
    Stroke("backhand volley", ("stroke", "bh", "volley", "DL"), (
        _key(-3.4, rh=(.06, .24, -.10), lh=(-.08, .26, -.06), hop=.08, crouch=.03, rf=(.18, 0, 0), lf=(-.18, 0, 0)),
        _key(-1.8, rh=(-.14, .16, .05), lh=(-.22, .12, .10), rd=(-.45, -.1, .9), sy=-38, hy=-22, crouch=.10,
            rf=(.16, .04, 0), lf=(-.18, .0, 0)),
        _key(0.0, rh=(-.22, .29, .02), lh=(-.28, .04, .02), rd=(-.55, .3, .8), sy=-26, hy=-26, crouch=.12, lean=20,
            rf=(-.12, .30, 0), lf=(-.16, -.10, 0), p=(-.06, .06)),
        _key(1.4, rh=(-.10, .34, -.08), lh=(-.28, .0, -.04), rd=(-.35, .6, .6), sy=-18, hy=-22, crouch=.12, lean=20,
            rf=(-.12, .30, 0), lf=(-.16, -.10, 0), p=(-.06, .06)),
        _key(2.8, rh=(.04, .25, -.12), lh=(-.10, .24, -.08), crouch=.05, rf=(.06, .14, 0), lf=(-.16, .02, 0),
            p=(-.03, .05)),
    )),
    # Two-handed backhand lob: low, then straight up in front of the body.
    Stroke("backhand lob", ("stroke", "bh", "lob", "DM"), (
        _key(-2.4, rh=(-.20, .04, -.31), two=1, rd=(-.6, -.4, -.6), sy=-54, hy=-34, crouch=.15, lean=22,
            rf=(.12, .06, 0), lf=(-.20, -.04, 0)),
        _key(-1.0, rh=(-.20, .16, -.32), two=1, rd=(-.7, .0, -.75), sy=-36, hy=-24, crouch=.18, lean=24,
            rf=(.12, .06, 0), lf=(-.20, -.04, 0)),
        _key(0.0, rh=(-.14, .27, -.24), two=1, rd=(-.75, .5, -.4), sy=-18, hy=-12, crouch=.13, lean=16,
            rf=(.12, .06, 0), lf=(-.20, -.04, 0)),
        _key(1.2, rh=(-.06, .24, .12), two=1, rd=(-.1, .3, .95), sy=-4, hy=-4, crouch=.03, lean=2,
            rf=(.12, .04, 0), lf=(-.18, -.02, .02)),
        _key(2.6, rh=(.0, .14, .28), two=1, rd=(.1, -.3, 1), sy=2, hy=0, crouch=-.01, lean=-4,
            rf=(.12, .02, 0), lf=(-.16, .0, 0)),
    )),
    # Smash: shuffle back sideways, left arm points up, scissor jump, short snap in front.
    Stroke("smash", ("stroke", "fh", "smash", "CC"), (
        _key(-3.4, rh=(.20, .02, .10), lh=(-.10, .22, .12), rd=(.1, -.1, 1), sy=55, hy=55, lean=-4, crouch=.05,
            rf=(.14, -.22, .03), lf=(-.04, .02, 0), p=(0, -.06)),
        _key(-1.6, rh=(.24, -.10, .14), lh=(-.06, .12, .34), rd=(.05, -.35, .9), sy=75, hy=60, lean=-12, crouch=.10,
            rf=(.10, -.24, 0), lf=(-.04, .04, .03), p=(0, -.10)),
        _key(0.0, rh=(.14, .10, .40), lh=(-.20, .16, .06), rd=(.1, .2, 1), sy=5, hy=-15, lean=4, crouch=-.02, hop=.13,
            rf=(.12, .16, .08), lf=(-.10, -.22, .05), p=(0, -.10)),
        _key(1.2, rh=(.08, .32, .06), lh=(-.22, .10, -.06), rd=(.0, .8, -.5), sy=-28, hy=-25, lean=18, hop=.02,
            rf=(.12, .16, 0), lf=(-.10, -.18, .04), p=(0, -.08)),
        _key(2.7, rh=(.0, .24, -.16), lh=(-.12, .22, -.12), rd=(-.2, .8, .3), sy=-10, hy=-6, lean=14, crouch=.07,
            rf=(.12, .06, 0), lf=(-.12, -.04, 0), p=(0, -.03)),
    )),
)
# fmt: on
