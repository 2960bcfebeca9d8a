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
    """What skeleton files do not say about themselves.

    Raises:
        ValueError: a value is invalid; names it.
    """

    joints: str | Sequence[int] = "coco17"  # a name in `JOINT_LAYOUTS`, or the position of each COCO joint in a file
    img_shape: tuple[int, int] | None = None  # (height, width) in px of files without it; None: the stored frame's size
    score_max: float = 1.0  # the score of a certain joint. Scores are divided by it

    def __post_init__(self) -> None:
        if isinstance(self.joints, str):
            is_valid = self.joints in JOINT_LAYOUTS
        else:
            is_valid = len(self.joints) == NUM_JOINTS and all(type(k) is int and k >= 0 for k in self.joints)
        if not is_valid:
            names = ", ".join(JOINT_LAYOUTS)
            raise ValueError(f"skeleton_joints={self.joints} is not one of {names}, or a list of 17 positions from 0")

    def joint_positions(self, num_joints: int) -> tuple[int, ...]:
        """The position of each COCO joint among the `num_joints` joints of a file.

        Raises:
            ValueError: the layout has another number of joints.
        """
        if isinstance(self.joints, str):
            size, positions = JOINT_LAYOUTS[self.joints]
            fits = num_joints == size
        else:
            fits, positions = max(self.joints) < num_joints, tuple(self.joints)
        if not fits:
            others = [name for name, (size, _) in JOINT_LAYOUTS.items() if size == num_joints]
            named = f"{' or '.join(others)} or to " if others else ""
            raise ValueError(
                f"{num_joints} joints, but data_module.skeleton_joints={self.joints}; set it to {named}the list of the "
                f"{NUM_JOINTS} positions of the COCO joints"
            )
        return positions
