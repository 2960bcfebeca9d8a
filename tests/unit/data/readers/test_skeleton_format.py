"""Joint layouts of skeleton files."""

import pytest

from mmdistill.data.readers.skeleton_format import JOINT_LAYOUTS, SkeletonFormat

# joints of OpenPose in the order of its documentation; BODY_25 has more, which are not read
OPENPOSE_ARMS = "neck rshoulder relbow rwrist lshoulder lelbow lwrist"
OPENPOSE_LEGS = "rhip rknee rankle lhip lknee lankle"
OPENPOSE18 = f"nose {OPENPOSE_ARMS} {OPENPOSE_LEGS} reye leye rear lear".split()
OPENPOSE25 = f"nose {OPENPOSE_ARMS} midhip {OPENPOSE_LEGS} reye leye rear lear".split()
PARTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
COCO = ["nose", *(f"{side}{part}" for part in PARTS for side in "lr")]


@pytest.mark.parametrize(("layout", "names"), [("openpose18", OPENPOSE18), ("openpose25", OPENPOSE25)])
def test_openpose_positions_are_those_of_the_named_joints(layout: str, names: list[str]) -> None:
    size, positions = JOINT_LAYOUTS[layout]
    assert [names[k] for k in positions] == COCO
    assert SkeletonFormat(layout).joint_positions(size) == positions


@pytest.mark.parametrize("num_joints", [7, 18, 133])
def test_another_number_of_joints_raises(num_joints: int) -> None:
    with pytest.raises(ValueError, match=f"{num_joints} joints, but data_module.skeleton_joints=coco17; set it to"):
        SkeletonFormat().joint_positions(num_joints)
    with pytest.raises(ValueError, match="17 positions"):
        SkeletonFormat(list(range(200, 217))).joint_positions(num_joints)


@pytest.mark.parametrize("joints", ["coco", [], list(range(16)), [-1, *range(16)], ["a"] * 17])
def test_invalid_joints_raise(joints: object) -> None:
    with pytest.raises(ValueError, match="is not one of coco17, openpose18, openpose25, wholebody133, or a list"):
        SkeletonFormat(joints)  # type: ignore[arg-type]
