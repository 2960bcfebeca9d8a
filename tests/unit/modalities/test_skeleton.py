"""Skeletons to heat-maps."""

from dataclasses import replace

import pytest
import torch

from mmdistill.modalities import ReaderOptions, get_modality, preprocess_clips
from mmdistill.modalities.skeleton import FLIPPED_JOINTS


def test_flip_exchanges_left_and_right_joints() -> None:
    assert [FLIPPED_JOINTS[j] for j in FLIPPED_JOINTS] == list(range(17))
    joints = torch.zeros(1, 1, 1, 17, 3)
    joints[0, 0, 0, 9] = torch.tensor([2.0, 5.0, 0.5])  # left wrist
    spec = get_modality("skeleton").spec(input_stride=1, sigma=1.0)
    for flip, joint, x in ((0, 9, 2), (1, 10, 15 - 2)):
        heat = preprocess_clips(joints, torch.tensor([[0.0, 0, 12, 16, flip]]), spec, (12, 16))[0, :, 0]
        assert (heat.amax(dim=(1, 2)) > 0).nonzero().flatten().tolist() == [joint]
        assert divmod(int(heat[joint].argmax()), 16) == (5, x)
        assert float(heat[joint].max()) == pytest.approx(0.5)


def test_missing_sigma_raises() -> None:
    spec = replace(get_modality("skeleton").spec(), sigma=None)
    with pytest.raises(ValueError, match="skeleton: sigma is not set"):
        preprocess_clips(torch.zeros(1, 1, 1, 17, 3), torch.tensor([[0.0, 0, 8, 8, 0]]), spec, (8, 8))


def test_reader_gets_the_options() -> None:
    options = ReaderOptions(frame_size=(4, 6), pattern="{video}/joints.pkl", max_persons=3)
    reader = get_modality("skeleton").open_reader("root", options)
    assert reader.files("a", [0, 1]) == ["root/a/joints.pkl"]
    assert reader.settings == (3,)
    assert get_modality("skeleton").open_reader("root", ReaderOptions((4, 6))).files("a", [0]) == ["root/a.pkl"]
