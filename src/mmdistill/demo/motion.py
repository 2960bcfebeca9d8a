"""Player motion of the demo dataset: from a sequence of strokes to COCO-17 joints in meters.

World axes, seen from the near baseline: x to the right, y to the net, z up; meters. Times are in frames. Limbs are
computed by two-bone inverse kinematics, so bone lengths are constant for every key pose of `demo.strokes`.

Shapes: S strokes of a rally, T frames of a rally, K key poses.
"""

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicHermiteSpline

from mmdistill.demo.strokes import FIELDS, POSE_SIZE, READY, SLICES, STROKES

UP = np.array([0.0, 0.0, 1.0])

_SPREAD = {
    "rh": 0.022, "lh": 0.03, "rd": 0.12, "two": 0.0, "sy": 7.0, "hy": 6.0, "lean": 3.5, "side": 3.0, "crouch": 0.012,
    "hop": 0.0, "p": 0.012, "rf": 0.018, "lf": 0.018,
}  # fmt: skip
SPREAD = np.concatenate([np.full(width, _SPREAD[name]) for name, width in FIELDS.items()])
for _name in ("rf", "lf"):  # the height of the feet does not vary
    SPREAD[SLICES[_name]][2] = 0.0
_LENGTHS = {  # mean in body heights, largest relative deviation
    "shoulder": (0.118, 0.10), "hip": (0.072, 0.10), "upper_arm": (0.176, 0.05), "forearm": (0.158, 0.05),
    "thigh": (0.242, 0.03), "shin": (0.243, 0.03), "spine": (0.285, 0.04),
}  # fmt: skip


@dataclass(frozen=True)
class Body:
    """Proportions and style of one player."""

    height: float  # meters
    lengths: dict[str, float]  # half widths of shoulders and hips, and bone lengths, in body heights
    thickness: float  # scales the thickness of all body parts
    amplitude: float  # scales the difference between stroke and ready pose
    tempo: float  # scales the times of the key poses
    pose_offsets: np.ndarray  # (number of stroke classes, POSE_SIZE), constant per player


def random_body(rng: np.random.Generator) -> Body:
    """Draw a player of 1.66 to 1.92 m with random proportions, amplitude, tempo and pose offsets per stroke class."""

    def vary(value: float, fraction: float) -> float:
        return float(value * rng.uniform(1 - fraction, 1 + fraction))

    return Body(
        height=float(rng.uniform(1.66, 1.92)),
        lengths={name: vary(*length) for name, length in _LENGTHS.items()},
        thickness=vary(1.0, 0.16),
        amplitude=vary(1.0, 0.10),
        tempo=vary(1.0, 0.08),
        pose_offsets=0.6 * SPREAD * rng.standard_normal((len(STROKES), POSE_SIZE)),
    )


def _draw_stroke_keys(stroke: int, body: Body, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw one execution of a stroke: key times (K,) relative to the contact, and key poses (K, POSE_SIZE)."""
    times, poses = STROKES[stroke].times, STROKES[stroke].poses
    amplitude = body.amplitude * rng.uniform(0.92, 1.08)
    poses = READY + (poses - READY) * np.where(SPREAD > 0, amplitude, 1.0)
    # One offset per execution and a smaller one per key: executions differ but remain smooth.
    poses = poses + body.pose_offsets[stroke] + SPREAD * (0.6 * rng.standard_normal(POSE_SIZE))
    poses = poses + 0.35 * SPREAD * rng.standard_normal(poses.shape)
    times = times * body.tempo * rng.uniform(0.95, 1.05) + rng.uniform(-0.12, 0.12, len(times)) * (times != 0)
    return times + rng.uniform(-0.25, 0.25), poses


def _interpolate(times: list[float], values: np.ndarray, num_frames: int) -> np.ndarray:
    """Values (K, D) at `times`, ascending, interpolated at the frames: (T, D). Constant before the first and last time.

    The tangents are finite differences (Catmull-Rom for non-uniform times), and 0 at the ends.
    """
    slopes = np.diff(values, axis=0) / np.diff(times)[:, None]
    tangents = np.pad(0.5 * (slopes[1:] + slopes[:-1]), ((1, 1), (0, 0)))
    interpolated: np.ndarray = CubicHermiteSpline(times, values, tangents)(
        np.clip(np.arange(num_frames), times[0], times[-1])
    )
    return interpolated


def interpolate_poses(
    strokes: list[int], contacts: list[float], num_frames: int, body: Body, rng: np.random.Generator
) -> np.ndarray:
    """Poses of one player in each frame of a rally, (T, POSE_SIZE).

    `strokes` are S indices into `STROKES`, `contacts` the S times of the contacts in frames, ascending. `rng` is the
    source of the timing jitter and of the variation of each execution.
    """
    times, poses = [-3.0], [READY]
    for stroke, contact in zip(strokes, contacts, strict=True):
        keys, rows = _draw_stroke_keys(stroke, body, rng)
        keys = keys + contact
        # If the previous stroke is too close, its last keys are dropped.
        while times[-1] > keys[0] - 0.9:
            times.pop()
            poses.pop()
        # Between the strokes the player returns to the ready pose if there is time.
        if keys[0] - times[-1] > 2.4:
            times.append(0.5 * (times[-1] + keys[0]))
            poses.append(READY + 0.3 * SPREAD * rng.standard_normal(POSE_SIZE))
        times.extend(keys)
        poses.extend(rows)
    times.append(times[-1] + 2.2)
    poses.append(READY)
    return _interpolate(times, np.stack(poses), num_frames)


def interpolate_positions(
    contacts: list[float], num_frames: int, max_offset: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sideways motion of a player who moves to a new random position before each of the S contacts (frames, ascending).

    Returns:
        x (T,), at most `max_offset` meters from the center line, and speed (T,) in meters per frame.
    """
    times, positions = [-3.0], [rng.uniform(-max_offset, max_offset)]
    for contact in contacts:
        if contact - 1.5 > times[-1] + 1.0:
            times.append(contact - 1.5)
            positions.append(rng.uniform(-max_offset, max_offset))
        times.append(contact + 1.8)
        positions.append(positions[-1])
    x = _interpolate(times, np.array(positions)[:, None], num_frames)[:, 0]
    return x, np.gradient(x)


def _normalize(v: np.ndarray) -> np.ndarray:
    unit: np.ndarray = v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)
    return unit


def _solve_two_bones(
    start: np.ndarray, end: np.ndarray, first: float, second: float, pole: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Middle joint and end joint of a two-bone chain that bends toward `pole`; all (T, 3).

    `first` and `second` are the bone lengths. If `end` cannot be reached, the end joint is the nearest possible point.
    """
    axis = end - start
    length = np.linalg.norm(axis, axis=-1, keepdims=True)
    axis = axis / np.maximum(length, 1e-6)
    length = np.clip(length, abs(first - second) + 1e-3, (first + second) * 0.998)
    along = (first**2 - second**2 + length**2) / (2 * length)
    away = np.sqrt(np.maximum(first**2 - along**2, 0.0))
    bend = _normalize(pole - axis * np.sum(pole * axis, axis=-1, keepdims=True))
    return start + axis * along + bend * away, start + axis * length


@dataclass(frozen=True)
class Figure:
    """A moving player in world coordinates, meters."""

    joints: np.ndarray  # (T, 17, 3) COCO-17
    grip: np.ndarray  # (T, 3) position of the racket grip
    racket: np.ndarray  # (T, 3) direction of the racket
    normal: np.ndarray  # (T, 3) normal of the racket face
    head: np.ndarray  # (T, 3) center of the head
    chest: np.ndarray  # (T, 3) horizontal direction of the chest
    ground: np.ndarray  # (T, 3) point on the ground below the player
    body: Body  # the player


def _yaw_directions(degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and forward directions (T, 3) of a body part that is rotated to its right by `degrees` (T, 1)."""
    a = np.radians(degrees)
    zero = np.zeros_like(a)
    return np.concatenate([np.cos(a), -np.sin(a), zero], 1), np.concatenate([np.sin(a), np.cos(a), zero], 1)


def _solve_head(fields: dict[str, np.ndarray], neck: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Center of the head, and nose, eyes and ears; each (T, 3)."""
    size = 0.068
    right, forward = _yaw_directions(0.35 * fields["sy"])
    center = neck + size * (1.75 * UP + 0.35 * forward * np.sin(np.radians(fields["lean"])) * 2)
    nose = center + size * (0.95 * forward - 0.1 * UP)
    eyes = [center + size * (0.8 * forward + s * 0.38 * right + 0.2 * UP) for s in (-1, 1)]
    ears = [center + size * (0.9 * s * right) for s in (-1, 1)]
    return center, [nose, *eyes, *ears]


def _solve_arms(
    fields: dict[str, np.ndarray], chest: np.ndarray, right: np.ndarray, forward: np.ndarray, body: Body
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Shoulders, elbows and wrists (left, right), grip and direction of the racket in the right hand; each (T, 3)."""
    bones = body.lengths["upper_arm"], body.lengths["forearm"]
    shoulders = [chest + s * body.lengths["shoulder"] * right for s in (-1, 1)]
    racket = _normalize(fields["rd"])
    down = -0.35 * forward + np.array([0, 0, -0.75])
    elbow_r, wrist_r = _solve_two_bones(shoulders[1], chest + fields["rh"], *bones, right * 0.6 + down)
    grip = wrist_r + 0.045 * _normalize(_normalize(wrist_r - elbow_r) + racket)
    two = np.clip(fields["two"], 0, 1)
    goal_l = (1 - two) * (chest + fields["lh"]) + two * (grip + 0.06 * racket)
    elbow_l, wrist_l = _solve_two_bones(shoulders[0], goal_l, *bones, -right * 0.6 + down)
    return [*shoulders, elbow_l, elbow_r, wrist_l, wrist_r], grip, racket


def _solve_legs(fields: dict[str, np.ndarray], pelvis: np.ndarray, speed: np.ndarray, body: Body) -> list[np.ndarray]:
    """Hips, knees and ankles (left, right); each (T, 3). A moving player lifts the feet alternately."""
    right, forward = _yaw_directions(fields["hy"])
    hips = [pelvis + s * body.lengths["hip"] * right for s in (-1, 1)]
    phase = np.cumsum(np.abs(speed)) / body.height * 9.0
    step = np.minimum(np.abs(speed) / body.height * 1.2, 0.07)
    legs = []
    for k, (name, hip) in enumerate(zip(("lf", "rf"), hips, strict=True)):
        shuffle = np.maximum(np.sin(phase * np.pi + k * np.pi), 0) * step
        ankle = fields[name] * np.array([1, 1, 0])
        ankle[:, 2] = 0.04 + np.maximum(fields[name][:, 2], 0) + shuffle + np.maximum(fields["hop"], 0)[:, 0]
        bones = body.lengths["thigh"], body.lengths["shin"]
        legs.append(_solve_two_bones(hip, ankle, *bones, forward + 0.25 * (2 * k - 1) * right))
    return [*hips, legs[0][0], legs[1][0], legs[0][1], legs[1][1]]


def solve_joints(pose: np.ndarray, x: np.ndarray, speed: np.ndarray, y: float, body: Body, *, facing: int) -> Figure:
    """World coordinates of the joints and of the racket.

    `pose` comes from `interpolate_poses`, `x` and `speed` from `interpolate_positions`. `y` is in meters from the near
    baseline. `facing` 1 faces +y (near player), -1 faces -y (far player: left and right are swapped in the image).
    """
    fields = {name: pose[:, columns] for name, columns in SLICES.items()}
    pelvis = np.concatenate([fields["p"], 0.525 - np.maximum(fields["crouch"], -0.03)], -1)
    pelvis[:, 2:] += np.maximum(fields["hop"], 0)
    lean, side = np.radians(fields["lean"]), np.radians(fields["side"])
    spine = _normalize(np.concatenate([np.tan(side), np.tan(lean), np.ones_like(lean)], -1))
    chest = pelvis + body.lengths["spine"] * spine
    right, forward = _yaw_directions(fields["sy"])
    arms, grip, racket = _solve_arms(fields, chest, right, forward, body)
    head, face = _solve_head(fields, chest)
    joints = [*face, *arms, *_solve_legs(fields, pelvis, speed, body)]
    normal = forward + np.array([0, 0, 0.15])
    normal = _normalize(normal - racket * np.sum(normal * racket, -1, keepdims=True))

    turn = np.array([facing, facing, 1.0])
    ground = np.stack([x, np.full_like(x, y), np.zeros_like(x)], -1)
    return Figure(
        joints=np.stack(joints, 1) * body.height * turn + ground[:, None],
        grip=grip * body.height * turn + ground,
        racket=racket * turn,
        normal=normal * turn,
        head=head * body.height * turn + ground,
        chest=forward * turn,
        ground=ground + np.pad(fields["p"] * body.height * facing, ((0, 0), (0, 1))),
        body=body,
    )
