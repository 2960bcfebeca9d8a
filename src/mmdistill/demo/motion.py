"""Motion of the demo dataset: strokes put into time, COCO-17 joints in metres.

World axes: x to the right, y to the net (seen from the near baseline), z up; metres. Times are frames. Limbs are
solved by two-bone inverse kinematics, so bone lengths hold whatever a key pose of `demo_strokes` asks for.

``S`` is the number of strokes of a rally, ``T`` of its frames.
"""

from dataclasses import dataclass

import numpy as np

from mmdistill.demo.strokes import FIELDS, POSE_SIZE, READY, SLICES, STROKES


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
    SPREAD[SLICES[_name]][2] = 0.0


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


def _arms(
    get: dict[str, np.ndarray],
    chest: np.ndarray,
    shoulders: list[np.ndarray],
    right: np.ndarray,
    forward: np.ndarray,
    body: Body,
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, np.ndarray]:
    """Elbows, wrists (left, right), grip and direction of the racket, which is in the right hand; each (T, 3)."""
    racket = _unit(get["rd"])
    down = -0.35 * forward + np.array([0, 0, -0.75])
    elbow_r, wrist_r = _two_bones(shoulders[1], chest + get["rh"], body.upper_arm, body.forearm, right * 0.6 + down)
    grip = wrist_r + 0.045 * _unit(_unit(wrist_r - elbow_r) + racket)
    two = np.clip(get["two"], 0, 1)
    goal_l = (1 - two) * (chest + get["lh"]) + two * (grip + 0.06 * racket)
    elbow_l, wrist_l = _two_bones(shoulders[0], goal_l, body.upper_arm, body.forearm, -right * 0.6 + down)
    return [elbow_l, elbow_r], [wrist_l, wrist_r], grip, racket


def _legs(
    get: dict[str, np.ndarray],
    hips: list[np.ndarray],
    right: np.ndarray,
    forward: np.ndarray,
    speed: np.ndarray,
    body: Body,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(knee, ankle) of the left and the right leg; each (T, 3). A shuffling player lifts one foot after the other."""
    phase = np.cumsum(np.abs(speed)) / body.height * 9.0
    step = np.minimum(np.abs(speed) / body.height * 1.2, 0.07)
    legs = []
    for k, (name, hip) in enumerate((("lf", hips[0]), ("rf", hips[1]))):
        shuffle = np.maximum(np.sin(phase * np.pi + k * np.pi), 0) * step
        ankle = get[name] * np.array([1, 1, 0])
        ankle[:, 2] = 0.04 + np.maximum(get[name][:, 2], 0) + shuffle + np.maximum(get["hop"], 0)[:, 0]
        legs.append(_two_bones(hip, ankle, body.thigh, body.shin, forward + 0.25 * (2 * k - 1) * right))
    return legs


def solve(pose: np.ndarray, x: np.ndarray, speed: np.ndarray, y: float, body: Body, *, facing: int) -> Figure:
    """Joints of a pose track.

    Args:
        pose: (T, POSE_SIZE); x, speed: (T,) from `walk_track`; y: metres from the near baseline.
        facing: 1 looks to +y (near player), -1 looks to -y (far player; left and right are swapped in the picture).
    """
    h = body.height
    get = {name: pose[:, part] for name, part in SLICES.items()}
    hop = np.maximum(get["hop"], 0)
    lift = np.concatenate([np.zeros((len(x), 2)), hop], -1)
    pelvis_z = 0.525 - np.maximum(get["crouch"], -0.03)
    pelvis = np.concatenate([get["p"], pelvis_z], -1) + lift
    lean, side = np.radians(get["lean"]), np.radians(get["side"])
    spine = _unit(np.concatenate([np.tan(side), np.tan(lean), np.ones_like(lean)], -1))
    chest = pelvis + body.spine * spine
    right_s, forward_s = _yaw(get["sy"][:, 0])
    right_h, forward_h = _yaw(get["hy"][:, 0])
    shoulders = [chest + s * body.shoulder * right_s for s in (-1, 1)]
    hips = [pelvis + s * body.hip * right_h for s in (-1, 1)]

    elbows, wrists, grip, racket = _arms(get, chest, shoulders, right_s, forward_s, body)
    legs = _legs(get, hips, right_h, forward_h, speed, body)
    head, face = _head_joints(chest, 0.35 * get["sy"][:, 0], get["lean"][:, 0], 0.068)

    joints = [*face, *shoulders, *elbows, *wrists, *hips]
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
