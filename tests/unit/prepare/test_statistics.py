"""Statistics of the model input are equal to the two-pass formula."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from torch.utils.data import default_collate

from mmdistill.data.annotations.base import Rally
from mmdistill.data.clips import ClipSpec, build_index
from mmdistill.data.dataset import ClipDataset, CropSpec
from mmdistill.data.masking import MaskSpec
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.modalities import get_modality, preprocess_clips
from mmdistill.prepare.statistics import dataset_statistics, to_mean_std

SIZE, CROP, FRAMES = (32, 48), (16, 32), 18


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "vid_frames_224/a").mkdir(parents=True)
    (tmp_path / "tennis_flows/a").mkdir(parents=True)
    (tmp_path / "skeletons").mkdir()
    for k in range(FRAMES):
        image = rng.integers(0, 255, (*SIZE, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"vid_frames_224/a/{k:06d}.jpg"), image)
        write_flow(tmp_path / f"tennis_flows/a/pair_{k:05d}.npy", rng.normal(1, 3, (2, *SIZE)).astype(np.float32))
    entry = {
        "keypoint": rng.uniform(8, 24, (2, FRAMES, 17, 2)),
        "keypoint_score": np.ones((2, FRAMES, 17)),
        "total_frames": FRAMES,
        "img_shape": SIZE,
    }
    entry["keypoint_score"][:, :, 0] = 0  # a joint that is never found and that a flip does not swap
    (tmp_path / "skeletons/a.pkl").write_bytes(pickle.dumps(entry))
    return tmp_path


def make_dataset(root: Path) -> ClipDataset:
    index = build_index([Rally("a", FRAMES, 25.0, ())], ClipSpec("windows", 4, stride=3))
    readers = {
        "rgb": RgbReader(root / "vid_frames_224", frame_size=SIZE),
        "flow": FlowReader(root / "tennis_flows", frame_size=SIZE),
        "skeleton": SkeletonReader(root / "skeletons", frame_size=SIZE),
    }
    crop = CropSpec(SIZE, CROP, augment=True, random_crop_min_scale=0.7, hflip_prob=0.5)
    return ClipDataset(index, readers, crop, MaskSpec((2, 2, 4)), seed=5)


def test_running_statistics_equal_the_two_pass_formula_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 7, dtype=torch.float64, generator=generator) * 1e-3 + torch.tensor([1e6, 0.0, -5.0])[:, None]
    scaler = StandardScaler()
    for batch in x.split([1, 20, 29]):
        scaler.partial_fit(batch.transpose(0, 1).flatten(1).T.numpy())
    values = x.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(scaler.mean_, values.mean(axis=1), rtol=1e-14, atol=1e-18)
    np.testing.assert_allclose(np.sqrt(scaler.var_), values.std(axis=1), rtol=1e-6)
    assert scaler.n_samples_seen_ == 350


@pytest.mark.parametrize("batch_size", [1, 4])
def test_statistics_match_the_model_input(root: Path, batch_size: int) -> None:
    ds = make_dataset(root)
    specs = {name: get_modality(name).spec() for name in ds.readers}
    statistics = dataset_statistics(ds, specs, batch_size=batch_size)
    batch = default_collate([ds[(0, i)] for i in range(len(ds))])
    for name, scaler in statistics.items():
        spec = get_modality(name).spec().with_statistics((0.0,), (1.0,))
        x = preprocess_clips(
            batch[name], batch["crop_box"], spec, (CROP[0] // spec.input_stride, CROP[1] // spec.input_stride)
        )
        values = x.double().transpose(0, 1).flatten(1).numpy()
        np.testing.assert_allclose(scaler.mean_, values.mean(axis=1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(np.sqrt(scaler.var_), values.std(axis=1), rtol=1e-9, atol=1e-12)
        mean, std, constant = to_mean_std(scaler)
        assert constant == ([0] if name == "skeleton" else [])
        if not constant:
            spec = get_modality(name).spec().with_statistics(mean, std)
            x = preprocess_clips(batch[name], batch["crop_box"], spec, CROP)
            assert x.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
            assert (x.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3


def test_statistics_of_some_clips_use_evenly_spaced_clips(root: Path) -> None:
    ds = make_dataset(root)
    specs = {name: get_modality(name).spec() for name in ds.readers}
    done: list[int] = []
    statistics = dataset_statistics(ds, specs, clips=2, batch_size=1, progress=done.append)
    assert done == [1, 2]
    batch = default_collate([ds[(0, i)] for i in (0, len(ds) - 1)])
    raw = specs["rgb"].with_statistics((0.0,), (1.0,))
    x = preprocess_clips(batch["rgb"], batch["crop_box"], raw, CROP).double()
    np.testing.assert_allclose(statistics["rgb"].mean_, x.mean(dim=(0, 2, 3, 4)), rtol=1e-9)


def test_constant_channels_get_std_1_and_are_listed() -> None:
    scaler = StandardScaler().fit([[3.0, 1.23456789], [3.0, 3.0]])
    assert to_mean_std(scaler) == ((3.0, 2.11728), (1.0, 0.882716), [0])
