"""How skeleton files of different pose networks store joints, scores and the size of the image."""

from collections.abc import Sequence
from dataclasses import dataclass

NUM_JOINTS = 17  # COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left before right

# Number of joints in a file, and the position of each COCO joint among them, by name of the layout.
JOINT_LAYOUTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "coco17": (17, tuple(range(NUM_JOINTS))),
    "openpose18": (18, (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)),
    "openpose25": (25, (0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11)),
    "wholebody133": (133, tuple(range(NUM_JOINTS))),
}


@dataclass(frozen=True)
class SkeletonFormat:
    """What keypoint files do not say about themselves.

    Raises:
        ValueError: a value is invalid; names it.
    """

    # A name in `JOINT_LAYOUTS`, or the position in a file of each of the `num_joints` joints that are read. None: a
    # file has exactly these joints, in their order
    joints: str | Sequence[int] | None = "coco17"
    img_shape: tuple[int, int] | None = None  # (height, width) in px of files without it; None: the stored frame's size
    score_max: float = 1.0  # the score of a certain joint. Scores are divided by it
    num_joints: int = NUM_JOINTS
    key: str = "data_module.skeleton_"  # start of the config keys of these values, for messages

    def __post_init__(self) -> None:
        if self.joints is None:
            return
        if isinstance(self.joints, str):
            is_valid = self.joints in JOINT_LAYOUTS and self.num_joints == NUM_JOINTS
        else:
            is_valid = len(self.joints) == self.num_joints and all(type(k) is int and k >= 0 for k in self.joints)
        if not is_valid:
            names = f"one of {', '.join(JOINT_LAYOUTS)}, or " if self.num_joints == NUM_JOINTS else ""
            raise ValueError(
                f"skeleton_joints={self.joints} is not {names}a list of {self.num_joints} positions from 0"
            )

    def joint_positions(self, num_joints: int) -> tuple[int, ...]:
        """The position of each joint that is read among the `num_joints` joints of a file.

        Raises:
            ValueError: the layout has another number of joints.
        """
        if self.joints is None:
            if num_joints != self.num_joints:
                raise ValueError(
                    f"{num_joints} keypoints, but the config names {self.num_joints}; correct joints or "
                    "extra_keypoints.names in data_module.modalities, or set data_module.skeleton_joints to positions"
                )
            return tuple(range(num_joints))
        if isinstance(self.joints, str):
            size, positions = JOINT_LAYOUTS[self.joints]
            fits = num_joints == size
        else:
            fits, positions = max(self.joints) < num_joints, tuple(self.joints)
        if not fits:
            others = [name for name, (size, _) in JOINT_LAYOUTS.items() if size == num_joints]
            named = f"{' or '.join(others)} or to " if others and self.num_joints == NUM_JOINTS else ""
            raise ValueError(
                f"{num_joints} joints, but data_module.skeleton_joints={self.joints}; set it to {named}the list of the "
                f"{self.num_joints} positions of the {'COCO ' if self.num_joints == NUM_JOINTS else ''}joints"
            )
        return positions
