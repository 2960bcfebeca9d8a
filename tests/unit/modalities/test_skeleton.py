"""Skeletons to heat-maps."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.data.readers.heatmaps import HeatmapReader
from mmdistill.data.readers.skeleton_format import SkeletonFormat
from mmdistill.modalities import (
    ExtraKeypointFiles,
    KeypointLayout,
    ModalitySpec,
    ReaderOptions,
    StoredHeatmaps,
    get_modality,
    preprocess_clips,
)
from mmdistill.modalities.skeleton import SkeletonModality

FLIPPED_JOINTS = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)  # left and right of COCO


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


LAYOUT = KeypointLayout(("a", "left", "right"), (("left", "right"),), (("a", "left"), ("left", "right")))


def _spec(layout: KeypointLayout = LAYOUT, **changes: object) -> ModalitySpec:
    return get_modality("skeleton").spec(
        **{"keypoints": layout, "channels": len(layout.channel_names), "input_stride": 1, "sigma": 1.0, **changes}
    )


def _sample(image: np.ndarray, y: float, x: float) -> float:
    """Bilinear interpolation of an image (h, w) at a position in px, with pixel centers at integers."""
    rows, columns = image.shape
    y0, x0 = int(np.floor(y)), int(np.floor(x))
    total = 0.0
    for i, j in ((y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1)):
        pixel = image[min(max(i, 0), rows - 1), min(max(j, 0), columns - 1)]
        total += float(pixel) * (1 - abs(y - i)) * (1 - abs(x - j))
    return total


@pytest.mark.parametrize("flip", [0, 1])
def test_stored_heatmaps_equal_their_formula(flip: int) -> None:
    """A heat-map of 7 x 9 px covers a frame of 40 x 60 px; the crop of 24 x 32 px becomes an input of 6 x 8 px."""
    maps = np.random.default_rng(0).random((2, 3, 7, 9))  # (T, J, h, w)
    top, left, height, width = 5, 11, 24, 32
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    spec = _spec(heatmaps=StoredHeatmaps((7, 9), (40, 60)), sigma=None, mean=mean, std=std)
    box = torch.tensor([[top, left, height, width, flip]], dtype=torch.float32)
    found = preprocess_clips(torch.from_numpy(maps)[None].half(), box, spec, (6, 8))[0].numpy()
    assert (found.dtype, found.shape) == (np.float32, (3, 2, 6, 8))
    for j, t, i, k in np.ndindex(3, 2, 6, 8):
        source = (0, 2, 1)[j] if flip else j  # left and right exchange their channels
        column = 7 - k if flip else k
        y = (top + (i + 0.5) * height / 6) * 7 / 40 - 0.5  # in heat-map px
        x = (left + (column + 0.5) * width / 8) * 9 / 60 - 0.5
        value = _sample(maps[t, source], y, x)
        assert found[j, t, i, k] == pytest.approx((value - mean[j]) / std[j], abs=2e-3)  # float16 input


def test_stored_heatmaps_of_the_input_size_are_copied() -> None:
    """The whole frame is the crop, and the heat-map has the size of the input: no value is interpolated."""
    maps = torch.rand(1, 2, 3, 14, 24)
    spec = _spec(heatmaps=StoredHeatmaps((14, 24), (224, 398)), sigma=None)
    box = torch.tensor([[0.0, 0, 224, 398, 0]])
    assert torch.equal(preprocess_clips(maps, box, spec, (14, 24)), maps.transpose(1, 2))


def test_stored_and_rendered_heatmaps_have_the_same_place() -> None:
    """A Gaussian that is stored at stride 4 of the frame equals the rendered one, also in a scaled and flipped crop."""
    joints = torch.tensor([[[[[30.0, 22.0, 0.9], [14.0, 30.0, 0.8], [41.0, 13.0, 1.0]]]]])  # (1, 1, 1, 3, 3)
    ys, xs = np.mgrid[:12, :16]
    stored = [
        s * np.exp(-((xs - ((x + 0.5) / 4 - 0.5)) ** 2 + (ys - ((y + 0.5) / 4 - 0.5)) ** 2) / (2 * 2.0**2))
        for x, y, s in joints[0, 0, 0].tolist()
    ]
    maps = torch.from_numpy(np.array(stored)).float()[None, None]
    for box in ([0.0, 0, 48, 64, 1], [8.0, 4, 32, 48, 1]):
        size = (int(box[2]) // 4, int(box[3]) // 4)
        rendered = preprocess_clips(joints, torch.tensor([box]), _spec(sigma=2.0), size)
        found = preprocess_clips(maps, torch.tensor([box]), _spec(heatmaps=StoredHeatmaps((12, 16), (48, 64))), size)
        drawn = rendered > 0  # rendered Gaussians end at 3 sigma
        assert (found - rendered)[drawn].abs().max() < 1e-5


@pytest.mark.parametrize("flip", [0, 1])
def test_limb_channels_equal_their_formula(flip: int) -> None:
    """Two persons, a limb of length 0, an absent joint: in float64, one pixel at a time."""
    rng, sigma = np.random.default_rng(0), 0.8
    joints = rng.uniform(-3, 20, (2, 3, 2, 3, 3))
    joints[..., 2] = rng.uniform(0.1, 1, (2, 3, 2, 3))
    joints[0, 0, 0, 1] = joints[0, 0, 0, 0]
    joints[0, 1, 0, 1, 2] = 0
    joints[0, 2, 1, 0, 0] = np.nan
    layout = replace(LAYOUT, limb_channels=True)
    spec = _spec(layout, sigma=sigma, mean=(0, 0, 0, 0.1, 0.2), std=(1, 1, 1, 0.5, 0.6))
    boxes = torch.tensor([[0.0, 0, 12, 16, flip]] * 2)
    found = preprocess_clips(torch.from_numpy(joints).float(), boxes, spec, (12, 16)).numpy()
    assert found.shape == (2, 5, 3, 12, 16)
    expected = np.zeros((2, 2, 3, 12, 16))
    for b, t, m, limb in np.ndindex(2, 3, 2, 2):
        moved = joints[b, t, m].copy()
        if flip:
            moved[:, 0] = 15 - moved[:, 0]
            moved = moved[[0, 2, 1]]
        first, second = moved[list(((0, 1), (1, 2))[limb])]
        if not np.isfinite([first, second]).all():
            continue
        length2 = float(((second - first)[:2] ** 2).sum())
        for i, k in np.ndindex(12, 16):
            along = 0.0
            if length2 > 0:
                along = ((k - first[0]) * (second - first)[0] + (i - first[1]) * (second - first)[1]) / length2
            near = first[:2] + min(max(along, 0), 1) * (second - first)[:2]
            distance = np.hypot(k - near[0], i - near[1])
            if distance <= 3 * sigma:
                value = min(first[2], second[2]) * np.exp(-(distance**2) / (2 * sigma**2))
                expected[b, limb, t, i, k] = max(expected[b, limb, t, i, k], value)
    np.testing.assert_allclose(found[:, 3] * 0.5 + 0.1, expected[:, 0], atol=1e-4)
    np.testing.assert_allclose(found[:, 4] * 0.6 + 0.2, expected[:, 1], atol=1e-4)
    without = preprocess_clips(torch.from_numpy(joints).float(), boxes, _spec(sigma=sigma), (12, 16)).numpy()
    np.testing.assert_array_equal(found[:, :3], without)


def test_flip_exchanges_the_pairs_of_any_layout() -> None:
    joints = torch.zeros(1, 1, 1, 3, 3)
    joints[0, 0, 0, 1] = torch.tensor([2.0, 5.0, 0.5])
    for flip, channel, x in ((0, 1, 2), (1, 2, 15 - 2)):
        heat = preprocess_clips(joints, torch.tensor([[0.0, 0, 12, 16, flip]]), _spec(), (12, 16))[0, :, 0]
        assert (heat.amax(dim=(1, 2)) > 0).nonzero().flatten().tolist() == [channel]
        assert divmod(int(heat[channel].argmax()), 16) == (5, x)


def test_reader_depends_on_heatmap_size_and_extra_keypoints() -> None:
    file_format = SkeletonFormat(None, None, 1.0, 3)
    stored = get_modality("skeleton").open_reader(
        "root", ReaderOptions((4, 6), frame_number_offset=1, skeleton=file_format, heatmap_size=(2, 3))
    )
    assert isinstance(stored, HeatmapReader)
    assert stored.files("a", [0]) == ["root/a/000001.npy"]
    extra = ExtraKeypointFiles(Path("more"), "{video}.npy", file_format)
    reader = get_modality("skeleton").open_reader("root", ReaderOptions((4, 6), extra_keypoints=extra))
    assert reader.files("a", [0]) == ["root/a.pkl", "more/a.npy"]


def test_another_keypoint_modality_has_its_own_name_and_layout() -> None:
    hand = SkeletonModality("hand", LAYOUT)
    assert (hand.name, hand.channels, hand.spec().keypoints) == ("hand", 3, LAYOUT)
    assert get_modality("skeleton").channels == 17
