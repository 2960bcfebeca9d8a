"""RGB frames to model input and to images."""

import numpy as np
import torch

from mmdistill.modalities import ReaderOptions, get_modality, preprocess_clips

RGB = get_modality("rgb").spec()


def test_rgb_crop_is_exact_and_normalized() -> None:
    clip = torch.randint(0, 256, (2, 2, 10, 12, 3), dtype=torch.uint8)
    x = preprocess_clips(clip, torch.tensor(((1.0, 3, 8, 8, 0), (2, 4, 8, 8, 1))), RGB, (8, 8))
    first = (clip[0, :, 1:9, 3:11].numpy() / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    second = (clip[1, :, 2:10, 4:12].numpy()[:, :, ::-1] / 255 - np.array(RGB.mean)) / np.array(RGB.std)
    np.testing.assert_allclose(x[0].permute(1, 2, 3, 0).numpy(), first, atol=1e-5)
    np.testing.assert_allclose(x[1].permute(1, 2, 3, 0).numpy(), second, atol=1e-5)


def test_reader_gets_the_options() -> None:
    options = ReaderOptions(frame_size=(4, 6), pattern="{video}/{frame}.jpg", frame_number_offset=1)
    reader = get_modality("rgb").open_reader("root", options)
    assert reader.files("a", [0, 9]) == ["root/a/1.jpg", "root/a/10.jpg"]


def test_image_has_the_colors_of_the_input() -> None:
    rgb, values = get_modality("rgb"), torch.rand(3, 2, 4, 5)
    for image in (rgb.to_image(values), rgb.energy_to_image(values)):
        np.testing.assert_array_equal(image, values.numpy().transpose(1, 2, 3, 0))
    assert rgb.display_max(values) == 1.0
