"""The keypoints of a modality: the heat-map channels of the model input, by name."""

import itertools
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class KeypointLayout:
    """The keypoints of a model input in the order of its channels.

    Attributes:
        names: one heat-map channel each.
        pairs: the left and the right keypoint of each pair, which a horizontal flip exchanges.
        limbs: keypoints that a line connects.
        limb_channels: whether each limb has a heat-map channel too, after those of the keypoints.
        num_extra: how many keypoints at the end belong to no person, for example ball and court corners.

    Raises:
        ValueError: a name occurs twice, or a pair or limb is invalid; names it.
    """

    names: tuple[str, ...]
    pairs: tuple[tuple[str, ...], ...] = ()
    limbs: tuple[tuple[str, ...], ...] = ()
    limb_channels: bool = False
    num_extra: int = 0

    def __post_init__(self) -> None:
        repeated = [name for name in self.names if self.names.count(name) > 1]
        if repeated:
            raise ValueError(f"the keypoint {repeated[0]} occurs twice")
        for kind, lines in (("pair", self.pairs), ("limb", self.limbs)):
            for line in lines:
                if len(line) != 2 or line[0] == line[1] or not set(line) <= set(self.names):
                    raise ValueError(
                        f"the {kind} [{', '.join(map(str, line))}] is not two of the keypoints {', '.join(self.names)}"
                    )
        paired = [name for pair in self.pairs for name in pair]
        for name in paired:
            if paired.count(name) > 1:
                raise ValueError(f"the keypoint {name} is in two pairs")
        if self.limb_channels and not self.limbs:
            raise ValueError("limb_channels: the joints have no limbs; set limbs in joints, or limb_channels=false")

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Names of the channels: the keypoints, then with `limb_channels` the limbs."""
        limbs = tuple(f"{a}-{b}" for a, b in self.limbs) if self.limb_channels else ()
        return (*self.names, *limbs)

    @property
    def flipped(self) -> tuple[int, ...]:
        """For each keypoint the position of the one that takes its channel after a horizontal flip."""
        other = {a: b for left, right in self.pairs for a, b in ((left, right), (right, left))}
        return tuple(self.names.index(other.get(name, name)) for name in self.names)

    @property
    def limb_positions(self) -> tuple[tuple[int, int], ...]:
        """Positions of the two keypoints of each limb."""
        return tuple((self.names.index(a), self.names.index(b)) for a, b in self.limbs)

    def with_more(self, names: tuple[str, ...], pairs: tuple[tuple[str, ...], ...]) -> "KeypointLayout":
        """This layout with further keypoints after its own, which belong to no person."""
        num_extra = self.num_extra + len(names)
        return replace(self, names=(*self.names, *names), pairs=(*self.pairs, *pairs), num_extra=num_extra)


def _chain(*names: str) -> tuple[tuple[str, str], ...]:
    """The limbs between consecutive keypoints."""
    return tuple(itertools.pairwise(names))


_BODY_PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_FINGERS = {"thumb": ("cmc", "mcp", "ip", "tip")} | dict.fromkeys(
    ("index", "middle", "ring", "pinky"), ("mcp", "pip", "dip", "tip")
)
_FINGER_NAMES = [tuple(f"{finger}_{part}" for part in parts) for finger, parts in _FINGERS.items()]

# COCO: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left before right
COCO17 = KeypointLayout(
    ("nose", *(f"{side}_{part}" for part in _BODY_PARTS for side in ("left", "right"))),
    tuple((f"left_{part}", f"right_{part}") for part in _BODY_PARTS),
    (
        ("left_shoulder", "right_shoulder"),
        *_chain("left_shoulder", "left_elbow", "left_wrist"),
        *_chain("right_shoulder", "right_elbow", "right_wrist"),
        ("left_shoulder", "left_hip"),
        ("right_shoulder", "right_hip"),
        ("left_hip", "right_hip"),
        *_chain("left_hip", "left_knee", "left_ankle"),
        *_chain("right_hip", "right_knee", "right_ankle"),
    ),
)
# One hand: the wrist, then four keypoints of each finger from the thumb on, as OpenPose and MediaPipe number them
HAND21 = KeypointLayout(
    ("wrist", *(name for names in _FINGER_NAMES for name in names)),
    limbs=tuple(limb for names in _FINGER_NAMES for limb in _chain("wrist", *names)),
)
KEYPOINT_LAYOUTS = {"coco17": COCO17, "hand21": HAND21}
