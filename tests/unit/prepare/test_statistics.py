"""Statistics: exact against the two-pass formula, over what the model is given."""

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import default_collate

from mmdistill.data.annotations.base import Rally
from mmdistill.data.annotations.f3set import to_json
from mmdistill.data.clips import build_index
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.readers.flow import FlowReader
from mmdistill.data.readers.flow_file import write_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.skeleton import SkeletonReader
from mmdistill.modalities import get_modality, preprocess_clips
from mmdistill.prepare.statistics import Moments, dataset_statistics, usable
from tests.commands import Script

ROOT = Path(__file__).resolve().parents[3]
SIZE, CROP, FRAMES = (32, 48), (16, 32), 18


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "vid_frames_224/a").mkdir(parents=True)
    (tmp_path / "tennis_flows/a").mkdir(parents=True)
    (tmp_path / "skeletons").mkdir()
    for k in range(FRAMES):
        picture = rng.integers(0, 255, (*SIZE, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"vid_frames_224/a/{k:06d}.jpg"), picture)
        write_flow(tmp_path / f"tennis_flows/a/pair_{k:05d}.npy", rng.normal(1, 3, (2, *SIZE)).astype(np.float32))
    entry = {
        "keypoint": rng.uniform(8, 24, (2, FRAMES, 17, 2)),
        "keypoint_score": np.ones((2, FRAMES, 17)),
        "total_frames": FRAMES,
        "img_shape": SIZE,
    }
    entry["keypoint_score"][:, :, 0] = 0  # a joint that is never there, and that a flip does not exchange
    (tmp_path / "skeletons/a.pkl").write_bytes(pickle.dumps(entry))
    return tmp_path


def dataset(root: Path) -> ClipDataset:
    index = build_index([Rally("a", FRAMES, 25.0, ())], clips="windows", num_frames=4, stride=3)
    readers = {
        "rgb": RgbReader(root / "vid_frames_224", frame_size=SIZE),
        "flow": FlowReader(root / "tennis_flows", frame_size=SIZE),
        "skeleton": SkeletonReader(root / "skeletons", frame_size=SIZE),
    }
    return ClipDataset(
        index, readers, grid=(2, 2, 4), crop=CROP, frame_size=SIZE, augment=True, seed=5, flip=0.5, min_scale=0.7
    )


def test_streaming_equals_the_two_pass_formula_far_from_zero() -> None:
    x = torch.randn(50, 3, 7, dtype=torch.float64) * 1e-3 + torch.tensor([1e6, 0.0, -5.0])[:, None]
    moments = Moments.empty(3)
    for part in x.split([1, 20, 29]):
        moments.add(part)
    whole = x.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(moments.mean, whole.mean(axis=1), rtol=1e-14)
    np.testing.assert_allclose(moments.std, whole.std(axis=1), rtol=1e-6)
    assert moments.count == 350


@pytest.mark.parametrize("batch_size", [1, 4])
def test_statistics_are_those_of_the_model_input(root: Path, batch_size: int) -> None:
    ds = dataset(root)
    got = dataset_statistics(ds, get_modality, batch_size=batch_size)
    batch = default_collate([ds[(0, i)] for i in range(len(ds))])
    for name, moments in got.items():
        spec = get_modality(name).spec().with_statistics((0.0,), (1.0,))
        x = preprocess_clips(
            batch[name], batch["crop_box"], spec, (CROP[0] // spec.input_stride, CROP[1] // spec.input_stride)
        )
        values = x.double().transpose(0, 1).flatten(1).numpy()
        np.testing.assert_allclose(moments.mean, values.mean(axis=1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(moments.std, values.std(axis=1), rtol=1e-9, atol=1e-12)
        mean, std, flat = usable(moments)
        assert flat == ([0] if name == "skeleton" else [])
        if not flat:
            spec = get_modality(name).spec().with_statistics(mean, std)
            x = preprocess_clips(batch[name], batch["crop_box"], spec, CROP)
            assert x.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-3
            assert (x.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-3


def test_the_script_writes_a_dataset_config(root: Path, script: Script) -> None:
    (root / "unlabel.json").write_text(json.dumps(to_json([Rally("a", FRAMES, 25.0, ())])))
    out = root / "new" / "mine.yaml"
    overrides = [
        f"data_module.target_data_dir={root}",
        "data_module.skeleton_dir=skeletons",
        "data_module.frame_size=[32,48]",
        "data_module.crop_size=[32,32]",
        "data_module.num_frames=4",
        "data_module.mask_ratio=0.5",
        "num_workers=0",
    ]
    done = script(
        "compute_stats.py", "--config-name", "config_pretrain_tennis", "--clips", 99, "--output", out, *overrides
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text.startswith("# @package data_module\n# statistics over 4 clips, by scripts/compute_stats.py\n")
    config = yaml.safe_load(text)
    assert 0.4 < config["modalities"]["rgb"]["mean"][0] < 0.6
    assert config["modalities"]["flow"]["mean"] == pytest.approx([1, 1], abs=0.2)
    assert config["modalities"]["flow"]["std"] == pytest.approx([3, 3], abs=0.2)
    assert len(config["modalities"]["skeleton"]["std"]) == 17
    assert "channels [0] never vary" in done.stderr.replace("\n", " ")
