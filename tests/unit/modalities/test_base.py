"""Specs, statistics and the registry of modalities; one crop box for all modalities."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmdistill.errors import InputError
from mmdistill.modalities import (
    BUILTIN_MODALITIES,
    MODALITIES,
    Modality,
    ModalitySpec,
    ReaderOptions,
    get_modality,
    modality_names,
    preprocess_clips,
    register_modality,
    stored_statistics,
)

FLIPPED_JOINTS = (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)  # left and right of COCO

DOCS = Path(__file__).resolve().parents[3] / "docs" / "extending.md"


class Depth(Modality):
    name = "depth"
    channels = 2

    def open_reader(self, root: Path, options: ReaderOptions) -> object:
        raise NotImplementedError

    def preprocess(
        self, clips: torch.Tensor, crop_boxes: torch.Tensor, spec: ModalitySpec, size: object
    ) -> torch.Tensor:
        return clips + spec.mean[0]


def test_single_statistics_are_used_for_all_channels() -> None:
    spec = ModalitySpec("flow", 2, 1, (0.5,), (2.0,), "pixel")
    assert (spec.mean, spec.std) == ((0.5, 0.5), (2.0, 2.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (1.0, 2.0, 3.0)}, "flow: mean has 3 values, expected 2 or 1"),
        ({"std": (1.0, 0.0)}, "flow: std must be positive"),
        ({"compensate": "mean"}, "flow: compensate='mean' is not one of null, median"),
        ({"target": "patch"}, "flow: target='patch' is not one of norm_pix, motion_energy, pixel"),
    ],
)
def test_invalid_spec_raises(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_modality("flow").spec(**changes)


def test_statistics_are_stored_and_restored() -> None:
    skeleton = get_modality("skeleton").spec(mean=(0.1,), std=(0.2,), sigma=2.0)
    stored = stored_statistics({"statistics": {"skeleton": skeleton.statistics}}, "skeleton")
    assert stored is not None
    assert get_modality("skeleton").spec().with_statistics(*stored) == skeleton
    assert stored_statistics({"statistics": {"skeleton": skeleton.statistics}}, "rgb") is None
    assert stored_statistics({}, "rgb") is None
    assert "sigma" not in get_modality("rgb").spec().statistics


def test_compensation_is_that_of_the_checkpoint() -> None:
    flow = get_modality("flow").spec(compensate="median")
    stored = stored_statistics({"statistics": {"flow": flow.statistics}}, "flow")
    assert stored is not None
    assert get_modality("flow").spec().with_statistics(*stored) == flow
    assert "compensate" not in get_modality("flow").spec().statistics  # as in older checkpoints
    assert flow.with_statistics((0.0,), (1.0,)).compensate is None
    with pytest.raises(ValueError, match="rgb: compensate='median' is not one of null"):
        get_modality("rgb").spec(compensate="median")


def test_registered_modality_is_found_by_name() -> None:
    assert modality_names()[:3] == BUILTIN_MODALITIES == ("rgb", "flow", "skeleton")
    with pytest.raises(InputError, match=r"modality 'depht' is not one of rgb, flow, skeleton"):
        get_modality("depht")
    depth = register_modality(Depth())
    try:
        assert get_modality("depth") is depth
        assert modality_names()[-1] == "depth"
        clips = torch.zeros(1, 2, 3, 4, 4)
        assert torch.equal(preprocess_clips(clips, torch.zeros(1, 5), depth.spec(mean=(7.0,)), (4, 4)), clips + 7)
        with pytest.raises(ValueError, match="already registered"):
            register_modality(Depth())
    finally:
        MODALITIES.unregister("depth")
    assert "depth" not in modality_names()


def test_example_of_the_docs() -> None:
    sources = re.findall(
        r"```python\n(.*?)```", DOCS.read_text().partition("## Modality")[2].partition("\n## ")[0], re.DOTALL
    )
    try:
        namespaces: list[dict[str, Any]] = [{} for _ in sources]
        for source, namespace in zip(sources, namespaces, strict=True):
            exec(source, namespace)
        assert namespaces[-1]["HAND"].spec().channels == 21
        clips, boxes = torch.rand(2, 3, 8, 10), torch.tensor([[1.0, 2, 4, 6, 0], [0, 0, 4, 6, 1]])
        x = preprocess_clips(clips, boxes, get_modality("depth").spec(), (4, 6))
        torch.testing.assert_close(x[0, 0], clips[0, :, 1:5, 2:8])
        torch.testing.assert_close(x[1, 0], clips[1, :, :4, :6].flip(2))
    finally:
        MODALITIES.unregister("depth")


def test_default_image_is_the_brightest_channel() -> None:
    values = torch.tensor([[0.2, 0.7], [0.5, 0.1]]).view(2, 1, 1, 2)
    image = Depth().to_image(values)
    np.testing.assert_allclose(image, np.array([0.5, 0.7])[None, None, :, None] * np.ones(3))
    assert Depth().display_max(values) == pytest.approx(0.7)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("crop", [(0, 0, 24, 32), (4, 8, 24, 32), (4, 6, 12, 16), (3, 5, 18, 24)])
def test_pixel_flow_and_joint_stay_at_one_position(flip: int, crop: tuple[int, int, int, int]) -> None:
    """After any crop and flip, the pixel, the flow and the joint of a moving dot agree in every frame."""
    height, width, frames, size = 32, 48, 4, (24, 32)
    clip = torch.zeros(1, frames, height, width, 3, dtype=torch.uint8)
    flow = torch.zeros(1, frames, 2, height, width)
    joints = torch.zeros(1, frames, 1, 17, 3)
    for k in range(frames):
        x, y = 10 + 2 * k, 8 + k
        clip[0, k, y - 1 : y + 2, x - 1 : x + 2] = 255
        flow[0, k, 0, y - 1 : y + 2, x - 1 : x + 2] = 2
        flow[0, k, 1, y - 1 : y + 2, x - 1 : x + 2] = 1
        joints[0, k, 0, 9] = torch.tensor([x, y, 1.0])  # the left wrist
    boxes = torch.tensor([[*crop, flip]], dtype=torch.float32)
    plain_rgb = get_modality("rgb").spec(mean=(0.0,), std=(1.0,))
    skeleton = get_modality("skeleton").spec(input_stride=1, sigma=1.0)
    pixels = preprocess_clips(clip, boxes, plain_rgb, size)[0, 0]
    displacement = preprocess_clips(flow, boxes, get_modality("flow").spec(), size)[0]
    joint = FLIPPED_JOINTS[9] if flip else 9
    heat = preprocess_clips(joints, boxes, skeleton, size)[0, joint]
    zoom = size[0] / crop[2]
    for k in range(frames):
        if pixels[k].max() < 0.5:
            pytest.fail(f"frame {k}: the dot left the crop; fix the test's crop")
        ys, xs = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
        center = [float((pixels[k] * axis).sum() / pixels[k].sum()) for axis in (ys, xs)]
        peak = divmod(int(heat[k].argmax()), size[1])
        assert abs(peak[0] - center[0]) <= 0.75
        assert abs(peak[1] - center[1]) <= 0.75
        y, x = round(center[0]), round(center[1])
        assert float(displacement[0, k, y, x]) == pytest.approx((-2 if flip else 2) * zoom, rel=0.05)
        assert float(displacement[1, k, y, x]) == pytest.approx(zoom, rel=0.05)
    other = 9 if flip else FLIPPED_JOINTS[9]
    assert preprocess_clips(joints, boxes, skeleton, size)[0, other].max() == 0
