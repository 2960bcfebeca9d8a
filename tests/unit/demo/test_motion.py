"""Player motion: constant bone lengths, and hands at the contact of each stroke."""

import numpy as np

from mmdistill.demo.motion import interpolate_poses, interpolate_positions, random_body, solve_joints

CONTACTS = [6.0, 15.0, 24.0]


def test_bones_have_constant_length_and_hands_reach_the_contact() -> None:
    body = random_body(np.random.default_rng(0))
    poses = interpolate_poses([2, 7, 11], CONTACTS, 30, body, np.random.default_rng(1))
    positions = interpolate_positions(CONTACTS, 30, 0.3, np.random.default_rng(2))
    joints = solve_joints(poses, *positions, 0.0, body, facing=1).joints
    bones = {(5, 7): "upper_arm", (8, 10): "forearm", (11, 13): "thigh", (14, 16): "shin"}
    for (a, b), name in bones.items():
        measured = np.linalg.norm(joints[:, a] - joints[:, b], axis=-1)
        np.testing.assert_allclose(measured, body.lengths[name] * body.height, rtol=1e-6)
    assert joints[24, 10, 2] > joints[24, 0, 2]  # a smash is hit above the head
    assert joints[6, 10, 0] > joints[6, 6, 0]  # a forehand on the right side
    assert joints[15, 10, 0] < joints[15, 6, 0]  # a backhand on the left side


def test_far_player_is_rotated_by_180_degrees() -> None:
    body = random_body(np.random.default_rng(0))
    poses = interpolate_poses([2], [6.0], 12, body, np.random.default_rng(1))
    still = np.zeros(12)
    near = solve_joints(poses, still, still, 0.0, body, facing=1)
    far = solve_joints(poses, still, still, 0.0, body, facing=-1)
    np.testing.assert_allclose(far.joints, near.joints * [-1, -1, 1], atol=1e-12)
    np.testing.assert_allclose(far.racket, near.racket * [-1, -1, 1], atol=1e-12)


def test_player_stays_within_the_offset_and_stands_still_at_contacts() -> None:
    x, speed = interpolate_positions(CONTACTS, 30, 0.3, np.random.default_rng(2))
    assert np.abs(x).max() <= 0.3 + 1e-9
    np.testing.assert_allclose(speed, np.gradient(x))
    for contact in CONTACTS:
        assert abs(x[int(contact) + 1] - x[int(contact)]) < 0.02
