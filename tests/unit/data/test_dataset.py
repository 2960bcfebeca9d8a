"""The dataset: pure samples, one crop box for all modalities, and policies for missing data."""

import multiprocessing
import pickle
import shutil
from dataclasses import fields, replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from mmdistill.data.annotations.base import Rally
from mmdistill.data.clips import ClipSpec, ClipTable, build_index
from mmdistill.data.dataloader import ClipLoader
from mmdistill.data.dataset import ClipDataset, CropSpec, init_worker
from mmdistill.data.masking import MaskSpec
from mmdistill.data.readers.base import FrameError, Reader
from mmdistill.data.readers.flow_file import pack_flow
from mmdistill.data.readers.rgb import RgbReader
from mmdistill.data.readers.zip_file import write_zip
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.modalities import BUILTIN_MODALITIES, get_modality, preprocess_clips
from tests.synthetic_dots import LEFT_WRIST, DotVideo, write_dot_video

RIGHT_WRIST = 10
CROP = (48, 80)


def dataset(video: DotVideo, *, videos: tuple[str, ...] = ("dot",), stride: int = 4, **changes: object) -> ClipDataset:
    rallies = [Rally(v, 24, 25.0, ()) for v in videos]
    index = build_index(rallies, ClipSpec("windows", 8, stride=stride, label="video"))
    options: dict[str, Any] = {"crop_size": CROP, "augment": True, "mask_ratio": 0.75, "seed": 7, **changes}
    crop_keys = {field.name for field in fields(CropSpec)} & options.keys()
    crop = CropSpec(video.size, **{key: options.pop(key) for key in crop_keys})
    return ClipDataset(
        index, video.readers(), crop, MaskSpec((4, 6, 10), mask_ratio=options.pop("mask_ratio")), **options
    )


def is_same(a: dict[str, object], b: dict[str, object]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)  # type: ignore[arg-type]


def test_sample_has_the_documented_types(dot: DotVideo) -> None:
    sample = dataset(dot)[0]
    assert {k: (v.dtype.name, v.shape) for k, v in sample.items()} == {
        "rgb": ("uint8", (8, 64, 96, 3)),
        "flow": ("float16", (8, 2, 64, 96)),
        "skeleton": ("float32", (8, 2, 17, 3)),
        "visible": ("int64", (4 * 15,)),
        "crop_box": ("float32", (5,)),
        "label": ("int64", ()),
        "index": ("int64", ()),
    }


def test_sample_depends_on_seed_epoch_and_clip_alone(dot: DotVideo) -> None:
    options = {"hflip_prob": 0.5, "random_crop_min_scale": 0.5}
    ds, again = dataset(dot, **options), dataset(dot, **options)
    for key in [(0, 1), (3, 0), (0, 0)]:
        ds[key]
    assert is_same(ds[(2, 1)], again[(2, 1)])
    assert is_same(ds[1], again[(0, 1)])
    boxes = {tuple(ds[(e, i)]["crop_box"]) for e in range(5) for i in range(4)}
    assert len(boxes) == 20
    assert not np.array_equal(ds[(0, 0)]["visible"], ds[(1, 0)]["visible"])
    assert not np.array_equal(ds[(0, 0)]["crop_box"], dataset(dot, seed=8, **options)[(0, 0)]["crop_box"])


def test_crop_boxes_stay_in_the_frame_and_reach_its_borders(dot: DotVideo) -> None:
    ds = dataset(dot, hflip_prob=0.3, random_crop_min_scale=0.6)
    clip = ds.index.clips[0]
    boxes = np.stack([ds.crop_box(e, clip) for e in range(400)])
    top, left, height, width, flip = boxes.T
    assert top.min() == left.min() == 0
    assert (top + height).max() == 64
    assert (left + width).max() == 96
    assert height.min() >= 0.6 * 48 - 1
    assert height.max() <= 48
    assert np.abs(width / height - 80 / 48).max() < 0.05
    assert 0.2 < flip.mean() < 0.4


def test_evaluation_uses_the_center_crop_without_flip_and_mask(dot: DotVideo) -> None:
    ds = dataset(dot, augment=False, mask_ratio=0.0, hflip_prob=1.0, random_crop_min_scale=0.5)
    assert ds[(5, 0)]["crop_box"].tolist() == [8, 8, 48, 80, 0]
    assert len(ds[0]["visible"]) == 4 * 6 * 10


def test_squash_uses_the_whole_frame(dot: DotVideo) -> None:
    for augment in (True, False):
        ds = dataset(dot, resize="squash", augment=augment)
        assert ds[(3, 1)]["crop_box"].tolist() == [0, 0, 64, 96, 0]
    ds = dataset(dot, resize="squash", random_crop_min_scale=0.5)
    boxes = np.stack([ds.crop_box(e, ds.index.clips[0]) for e in range(100)])
    assert np.abs(boxes[:, 3] / boxes[:, 2] - 96 / 64).max() < 0.05
    assert boxes[:, 2].min() < 40
    assert dataset(dot, resize="squash", crop_size=(128, 128))[0]["crop_box"].tolist() == [0, 0, 64, 96, 0]
    with pytest.raises(ValueError, match="resize='pad' is not one of crop, squash"):
        dataset(dot, resize="pad")


def _peak(x: torch.Tensor) -> tuple[float, float]:
    """(x, y), the weighted mean position of the positive values of (h, w)."""
    weight = x.clamp(min=0).double()
    ys, xs = torch.meshgrid(torch.arange(x.shape[0]).double(), torch.arange(x.shape[1]).double(), indexing="ij")
    return float((weight * xs).sum() / weight.sum()), float((weight * ys).sum() / weight.sum())


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hflip_prob": 1.0},
        {"random_crop_min_scale": 0.6},
        {"hflip_prob": 0.5, "random_crop_min_scale": 0.6},
        {"resize": "squash"},
        {"resize": "squash", "hflip_prob": 0.5, "random_crop_min_scale": 0.6},
    ],
)
def test_pixel_flow_and_joint_stay_at_one_position(dot: DotVideo, options: dict[str, Any], scale: int) -> None:
    ds = dataset(dot, mask_ratio=0.0, **options)
    specs = {n: get_modality(n).spec(mean=(0.0,), std=(1.0,)) for n in BUILTIN_MODALITIES}
    specs["skeleton"] = replace(specs["skeleton"], input_stride=scale, sigma=1.0)
    compared = 0
    for epoch, i in [(e, i) for e in range(4) for i in range(len(ds))]:
        batch = default_collate([ds[(epoch, i)]])
        box = batch["crop_box"][0]
        flip, zoom = bool(box[4]), np.array([CROP[1], CROP[0]]) / box[[3, 2]].numpy()
        rgb = preprocess_clips(batch["rgb"], batch["crop_box"], specs["rgb"], CROP)[0]
        flow = preprocess_clips(batch["flow"], batch["crop_box"], specs["flow"], CROP)[0]
        size = (CROP[0] // scale, CROP[1] // scale)
        joints = preprocess_clips(batch["skeleton"], batch["crop_box"], specs["skeleton"], size)[0]
        wrist = RIGHT_WRIST if flip else LEFT_WRIST
        assert float(joints[[j for j in range(17) if j != wrist]].abs().sum()) == 0
        for position, k in enumerate(ds.index.clips[i].frames):
            x, y = (dot.positions[k] - box[[1, 0]].numpy() + 0.5) * zoom - 0.5
            x = CROP[1] - 1 - x if flip else x
            if not (6 < x < CROP[1] - 7 and 6 < y < CROP[0] - 7):
                continue  # the dot is at the border of the crop or outside
            compared += 1
            red = rgb[0, position] - rgb[2, position] - 0.2
            assert _peak(red) == pytest.approx((x, y), abs=0.35)
            displacement = (dot.positions[k + 1] - dot.positions[k]) * zoom * (np.array([-1, 1]) if flip else 1)
            assert _peak(flow[0, position].abs()) == pytest.approx((x, y), abs=0.35)
            strongest = flow[:, position].flatten(1)[:, int(flow[0, position].abs().argmax())]
            np.testing.assert_allclose(strongest, displacement, rtol=0.05)
            in_input = tuple(scale * (v + 0.5) - 0.5 for v in _peak(joints[wrist, position]))
            assert in_input == pytest.approx((x, y), abs=0.3 * scale)
    assert compared > 40


def test_workers_and_main_process_give_equal_batches(dot: DotVideo) -> None:
    ds = dataset(dot, hflip_prob=0.5)

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        sampler = EpochBatchSampler(len(ds), batch_size=2, seed=1)
        loader = DataLoader(ds, batch_sampler=sampler, num_workers=workers, worker_init_fn=init_worker)
        return list(loader)

    for a, b in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def _motion_dataset(dot: DotVideo, source: str, *names: str, **more: Any) -> ClipDataset:
    """Masks by the motion of `source`, of a dataset that reads `names`."""
    index = build_index([Rally("dot", 24, 25.0, ())], ClipSpec("windows", 8, stride=4, label="video"))
    readers = {name: reader for name, reader in dot.readers().items() if name in names}
    crop = CropSpec(dot.size, CROP, augment=True, random_crop_min_scale=0.6, hflip_prob=0.5)
    mask = MaskSpec((4, 6, 10), "motion", 0.75, 0.5)
    return ClipDataset(index, readers, crop, mask, seed=7, motion_source=source, **more)


@pytest.mark.parametrize("source", BUILTIN_MODALITIES)
def test_motion_masks_keep_the_moving_object_and_depend_on_seed_epoch_and_clip(dot: DotVideo, source: str) -> None:
    ds = _motion_dataset(dot, source, *BUILTIN_MODALITIES)
    alone = _motion_dataset(dot, source, source)  # the other modalities do not change the tokens
    seen = []
    for epoch in (0, 1):
        for i in (2, 0, 1):
            sample = ds[(epoch, i)]
            assert len(sample["visible"]) == 60
            assert np.array_equal(sample["visible"], alone[(epoch, i)]["visible"])
            assert (sample["motion"].dtype, sample["motion"].shape) == (np.float32, (240,))
            top, left, height, width, flip = sample["crop_box"]
            for t in range(4):
                for x, y in dot.positions[list(ds.index.clips[i].frames[2 * t : 2 * t + 1])]:
                    column, row = (x + 0.5 - left) / width * 10, (y + 0.5 - top) / height * 6
                    column = 10 - column if flip else column
                    if 0.2 < column < 9.8 and 0.2 < row < 5.8:  # the dot is in the crop
                        seen.append((t * 6 + int(row)) * 10 + int(column) in sample["visible"])
    assert np.mean(seen) > 0.9  # 0.25 for random masks
    again = _motion_dataset(dot, source, *BUILTIN_MODALITIES)
    assert is_same(ds[(1, 2)], again[(1, 2)])
    assert not np.array_equal(ds[(0, 2)]["visible"], ds[(1, 2)]["visible"])


def test_motion_masks_are_the_same_in_cached_epochs(dot: DotVideo) -> None:
    """From epoch 1 on only the frames are read."""
    ds = _motion_dataset(dot, "rgb", *BUILTIN_MODALITIES, cached_epochs=1, always_decoded=("rgb",))
    first, cached = ds[(0, 1)], ds[(1, 1)]
    assert "flow" not in cached
    assert np.array_equal(first["visible"], cached["visible"])


def test_motion_masks_do_not_depend_on_workers_and_order(dot: DotVideo) -> None:
    ds = _motion_dataset(dot, "rgb", "rgb")
    loader = DataLoader(ds, batch_size=3, sampler=[3, 0, 2, 1], num_workers=1, worker_init_fn=init_worker)
    for batch in loader:
        for i, visible, motion in zip(batch["index"].tolist(), batch["visible"], batch["motion"], strict=True):
            assert np.array_equal(ds[i]["visible"], visible)
            assert np.array_equal(ds[i]["motion"], motion)


def test_a_modality_without_motion_is_an_error(dot: DotVideo) -> None:
    class Depth(RgbReader):
        motion_energy = Reader.motion_energy

    reader = Depth(dot.root / "frames", frame_size=dot.size)
    index = build_index([Rally("dot", 24, 25.0, ())], ClipSpec("windows", 8, label="video"))
    with pytest.raises(ValueError, match="the modality depth defines no motion, which mask_type=motion"):
        ClipDataset(index, {"depth": reader}, CropSpec(dot.size, CROP), MaskSpec((4, 6, 10)), motion_source="depth")


def _write_two_videos(tmp_path: Path) -> DotVideo:
    video = write_dot_video(tmp_path)
    write_dot_video(tmp_path, video="gap")
    return video


def test_on_missing_error_names_clip_and_file(tmp_path: Path) -> None:
    video = _write_two_videos(tmp_path)
    (tmp_path / "flow/gap/pair_00005.npy").unlink()
    ds = dataset(video, videos=("dot", "gap"))
    assert len(ds) == 8
    with pytest.raises(FrameError, match=r"clip gap:000004: .*pair_00005.npy: no such flow file") as raised:
        ds[5]
    assert "; add the missing file, or set data_module.on_missing=repeat or skip; " in str(raised.value)
    loader = DataLoader(ds, batch_size=1, num_workers=1)
    with pytest.raises(FrameError, match=r"pair_00005.npy"):
        list(loader)


def test_on_missing_skip_removes_and_counts_clips(tmp_path: Path) -> None:
    video = _write_two_videos(tmp_path)
    (tmp_path / "flow/gap/pair_00005.npy").unlink()
    (tmp_path / "skeleton/dot.pkl").unlink()
    ds = dataset(video, videos=("dot", "gap"), on_missing="skip")
    assert [c.id for c in ds.index.clips] == ["gap:000008", "gap:000012"]
    report = ds.missing_report()
    assert report["clips_skipped"] == {"flow": {"gap": 2}, "skeleton": {"dot": 4}}
    assert ds.index.report["skipped_as_missing"] == 6
    assert ds.index.classes == ("dot", "gap")


def test_on_missing_repeat_counts_each_frame_once_over_all_workers(tmp_path: Path) -> None:
    video = _write_two_videos(tmp_path)
    (tmp_path / "flow/gap/pair_00001.npy").unlink()
    (tmp_path / "frames/gap/000013.jpg").write_bytes(b"")
    (tmp_path / "skeleton/dot.pkl").unlink()
    ds = dataset(video, videos=("dot", "gap"), stride=8, on_missing="repeat")
    assert [c.id for c in ds.index.clips] == ["gap:000000", "gap:000008"]
    for _ in range(2):
        list(ClipLoader(ds, batch_size=1, num_workers=2))
    report = ds.missing_report()
    assert report["frames_repeated"] == {"rgb": {"gap": 1}, "flow": {"gap": 1}}
    assert report["clips_skipped"] == {"skeleton": {"dot": 2}}
    np.testing.assert_array_equal(ds[0]["flow"][1], ds[0]["flow"][0])


def test_unreadable_clip_is_replaced_in_training_and_raises_in_evaluation(tmp_path: Path) -> None:
    video = _write_two_videos(tmp_path)
    jpeg = tmp_path / "frames/gap/000022.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:500])
    options: dict[str, object] = {"videos": ("dot", "gap"), "on_missing": "skip", "stride": 1}
    ds = dataset(video, **options)  # type: ignore[arg-type]
    damaged = next(i for i, c in enumerate(ds.index.clips) if 22 in c.frames and c.video == "gap")
    replaced = ds[(3, damaged)]
    assert int(replaced["index"]) != damaged
    assert is_same(replaced, ds[(3, int(replaced["index"]))])
    assert is_same(replaced, dataset(video, **options)[(3, damaged)])  # type: ignore[arg-type]
    assert ds.missing_report()["clips_replaced"] == {"gap": 1}
    with pytest.raises(FrameError, match="truncated JPEG"):
        dataset(video, augment=False, **options)[damaged]  # type: ignore[arg-type]


def test_more_unreadable_clips_than_the_maximum_raise(tmp_path: Path) -> None:
    video = _write_two_videos(tmp_path)
    for k in range(24):
        (tmp_path / f"frames/gap/{k:06d}.jpg").write_bytes(b"")
    ds = dataset(video, videos=("dot", "gap"), on_missing="skip")
    with pytest.raises(FrameError, match=r"more than 1 of 8 clips cannot be read.*check-data"):
        list(map(ds.__getitem__, range(8)))


def test_dataset_works_in_spawned_workers(dot: DotVideo) -> None:
    ds = pickle.loads(pickle.dumps(dataset(dot)))
    assert is_same(ds[0], dataset(dot)[0])
    context = multiprocessing.get_context("spawn")
    loader = DataLoader(dataset(dot), batch_size=4, num_workers=1, multiprocessing_context=context)
    assert len(list(loader)) == 1


def test_error_names_the_invalid_argument(dot: DotVideo) -> None:
    for wrong in (
        {"on_missing": "zero"},
        {"crop_size": (80, 80)},
        {"random_crop_min_scale": 0.0},
        {"hflip_prob": 1.5},
        {"mask_ratio": 1.0},
    ):
        with pytest.raises(ValueError, match=r"on_missing=|crop_size=|random_crop_min_scale=|hflip_prob=|ratio"):
            dataset(dot, **wrong)


def test_dataset_can_be_empty_after_skipping(dot: DotVideo) -> None:
    shutil.rmtree(dot.root / "flow")
    assert len(dataset(dot, on_missing="skip")) == 0


def test_spawned_workers_share_the_clips(dot: DotVideo) -> None:
    """Their pickled copy of the dataset refers to shared memory."""
    index = build_index([Rally("dot", 10_009, 25.0, ())], ClipSpec("windows", 8, stride=1))
    ds = ClipDataset(index, dot.readers(), CropSpec(dot.size, CROP), MaskSpec((4, 6, 10)))
    clips = ds.index.clips
    assert isinstance(clips, ClipTable)
    assert isinstance(clips.rows, torch.Tensor)
    assert not clips.rows.is_shared()  # workers that are forked need no shared memory
    data = ForkingPickler.dumps(ds)
    assert clips.rows.is_shared()
    assert len(data) < 10_000
    copy = ForkingPickler.loads(data)
    assert copy.index.clips.rows.is_shared()
    assert (len(copy), copy.index.clips[9_999]) == (10_001, index.clips[9_999])


def test_packed_files_give_identical_samples_and_a_truncated_one_follows_the_policy(tmp_path: Path) -> None:
    video = _write_two_videos(tmp_path)
    options: dict[str, Any] = {"videos": ("dot", "gap"), "hflip_prob": 0.5}
    expected = [dataset(video, **options)[(1, i)] for i in range(8)]
    for name, write, packed in (("frames", write_zip, "frames.zip"), ("flow", pack_flow, "flow.npy")):
        for folder in ("dot", "gap"):
            files = list((tmp_path / name / folder).iterdir())
            write(tmp_path / name / folder / packed, files)
            for file in files:
                file.unlink()
    for policy in ("error", "repeat", "skip"):
        ds = dataset(video, on_missing=policy, **options)
        assert all(is_same(ds[(1, i)], sample) for i, sample in enumerate(expected))
    for path in (tmp_path / "frames/gap/frames.zip", tmp_path / "flow/gap/flow.npy"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FrameError, match=r"clip gap:000000: .*gap/frames.zip: truncated, or not a zip archive"):
        dataset(video, **options)[4]
    for policy in ("repeat", "skip"):
        ds = dataset(video, on_missing=policy, **options)
        assert [clip.video for clip in ds.index.clips] == ["dot"] * 4
        assert ds.missing_report()["clips_skipped"] == {"rgb": {"gap": 4}, "flow": {"gap": 4}}
