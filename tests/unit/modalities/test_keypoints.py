"""Layouts of keypoints: channels, mirror images and limbs."""

from itertools import pairwise

import pytest

from mmdistill.modalities import COCO17, KEYPOINT_LAYOUTS, KeypointLayout

ARMS = KeypointLayout(
    ("head", "left_hand", "right_hand"), (("left_hand", "right_hand"),), (("head", "right_hand"), ("head", "left_hand"))
)


def test_coco17_has_the_order_of_coco() -> None:
    parts = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    assert COCO17.names == ("nose", *(f"{side}_{part}" for part in parts for side in ("left", "right")))
    assert COCO17.flipped == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    arms = {(5, 6), (5, 7), (7, 9), (6, 8), (8, 10)}
    assert set(COCO17.limb_positions) == arms | {(5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)}


def test_hand21_is_a_wrist_and_five_fingers_of_four_joints() -> None:
    hand = KEYPOINT_LAYOUTS["hand21"]
    assert (len(hand.channel_names), hand.names[0], hand.names[4::4]) == (
        21,
        "wrist",
        ("thumb_tip", "index_tip", "middle_tip", "ring_tip", "pinky_tip"),
    )
    assert hand.flipped == tuple(range(21))
    fingers = [[0, *range(first, first + 4)] for first in (1, 5, 9, 13, 17)]
    assert hand.limb_positions == tuple((a, b) for f in fingers for a, b in pairwise(f))


def test_more_keypoints_follow_with_their_pairs() -> None:
    layout = ARMS.with_more(("ball", "net_left", "net_right"), (("net_left", "net_right"),))
    assert layout.channel_names == ("head", "left_hand", "right_hand", "ball", "net_left", "net_right")
    assert layout.flipped == (0, 2, 1, 3, 5, 4)
    assert layout.limb_positions == ((0, 2), (0, 1))
    assert layout.num_extra == 3


def test_limb_channels_follow_the_keypoints() -> None:
    layout = KeypointLayout(ARMS.names, ARMS.pairs, ARMS.limbs, limb_channels=True).with_more(("ball",), ())
    assert layout.channel_names[3:] == ("ball", "head-right_hand", "head-left_hand")
    assert len(layout.flipped) == 4


@pytest.mark.parametrize(
    ("pairs", "limbs", "names", "message"),
    [
        ((), (), ("a", "b", "a"), "the keypoint a occurs twice"),
        ((("a", "c"),), (), ("a", "b"), r"the pair \[a, c\] is not two of the keypoints a, b"),
        ((("a", "a"),), (), ("a", "b"), r"the pair \[a, a\] is not two"),
        ((("a",),), (), ("a", "b"), r"the pair \[a\] is not two"),
        ((("a", "b"), ("c", "a")), (), ("a", "b", "c"), "the keypoint a is in two pairs"),
        ((), (("a", "b", "c"),), ("a", "b", "c"), r"the limb \[a, b, c\] is not two"),
    ],
)
def test_invalid_layout_raises(
    pairs: tuple[tuple[str, ...], ...], limbs: tuple[tuple[str, ...], ...], names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KeypointLayout(names, pairs, limbs)


def test_limb_channels_without_limbs_raise() -> None:
    with pytest.raises(ValueError, match="limb_channels: the joints have no limbs"):
        KeypointLayout(("a", "b"), limb_channels=True)
