"""Stroke classes of the demo dataset, defined by the key poses in ``strokes.yaml``.

A pose is one row of numbers (`FIELDS`) in body heights and degrees. x points to the right, y to the net, z up. Hand
positions are relative to the center of the shoulders, feet and pelvis to the point on the ground below the player.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import yaml

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
SLICES = {name: slice(end - FIELDS[name], end) for name, end in zip(FIELDS, accumulate(FIELDS.values()), strict=True)}
POSE_SIZE = sum(FIELDS.values())


@dataclass(frozen=True)
class Stroke:
    """One class of stroke."""

    name: str  # short name of the class
    # (type, side, technique, direction), four of the eight fields of an F3Set label; they identify the class
    fields: tuple[str, ...]
    times: np.ndarray  # (K,) times of the key poses in frames relative to the contact, ascending
    poses: np.ndarray  # (K, POSE_SIZE) key poses. Before and after, the player is in the ready pose


def _pose_row(base: np.ndarray, values: Mapping[str, Any]) -> np.ndarray:
    row = base.copy()
    for name in values.keys() & FIELDS.keys():
        row[SLICES[name]] = values[name]
    return row


_content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
READY = _pose_row(np.zeros(POSE_SIZE), _content["ready"])
STROKES = tuple(
    Stroke(
        stroke["name"],
        tuple(stroke["fields"]),
        np.array([key["time"] for key in stroke["keys"]], float),
        np.stack([_pose_row(READY, key) for key in stroke["keys"]]),
    )
    for stroke in _content["strokes"]
)
