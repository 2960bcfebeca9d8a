"""Source clips beside target clips: their order and their samples."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmdistill.builders import make_clip_dataset, make_source_dataset
from mmdistill.data.dataset import ClipDataset
from mmdistill.data.joint import JointBatchSampler, JointDataset, Key
from mmdistill.data.readers.base import FrameError
from mmdistill.data.sampler import EpochBatchSampler
from tests.configs import pretrain_config
from tests.tiny_data import make_tiny, overrides


def _epoch(epoch: int, *, start: int = 0, rank: int = 0, world_size: int = 1) -> list[list[tuple[Key, Key]]]:
    """Batches of 4 clips over all ranks; an epoch uses 8 of 9 target clips, and there are 5 source clips."""
    target = EpochBatchSampler(9, batch_size=4 // world_size, seed=3, rank=rank, world_size=world_size)
    target.set_state(epoch, start)
    return list(JointBatchSampler(target, 5, clips_per_epoch=8))


def test_source_is_read_in_shuffled_passes() -> None:
    keys = [source for epoch in range(5) for batch in _epoch(epoch) for _, source in batch]
    assert [number for number, _ in keys] == [i // 5 for i in range(40)]
    passes = [[clip for number, clip in keys if number == i] for i in range(8)]
    assert all(sorted(clips) == list(range(5)) for clips in passes)
    assert len(set(map(tuple, passes))) > 4  # of 8 orders


def test_order_of_the_target_stays_and_the_order_of_the_source_is_a_function_of_the_position() -> None:
    plain = EpochBatchSampler(9, batch_size=4, seed=3)
    plain.set_state(2, 0)
    full = _epoch(2)
    assert [[target for target, _ in batch] for batch in full] == list(plain)
    assert _epoch(2, start=1) == full[1:]
    ranks = [_epoch(2, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == full


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny") / "data", per_class=1)


@pytest.fixture(scope="module")
def dataset(root: Path) -> JointDataset:
    data = pretrain_config(*overrides(root)).data_module
    target = make_clip_dataset(data, ("flow",), training=True, seed=0)
    return JointDataset(target, make_source_dataset(data, "flow", seed=1))


def test_sample_has_both_clips_and_the_mask_of_the_target(dataset: JointDataset) -> None:
    sample, target, source = dataset[(1, 4), (2, 3)], dataset.target[1, 4], dataset.source[2, 3]
    assert len(dataset) == len(dataset.target) == 12
    assert sample["source"].keys() == target.keys() - {"visible"}
    for name, value in target.items():
        np.testing.assert_array_equal(sample[name], value)
    for name, value in sample["source"].items():
        np.testing.assert_array_equal(value, source[name])
    assert Counter(clip.label for clip in dataset.source.index.clips) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_counts_of_both_datasets_are_shared_with_workers(dataset: JointDataset) -> None:
    dataset.share_memory()
    parts: list[ClipDataset] = [dataset.target, dataset.source]
    assert all(part._seen.is_shared() for part in parts)


def test_error_of_a_source_clip_names_its_key(dataset: JointDataset, root: Path) -> None:
    clip = dataset.source.index.clips[2]
    path = root / "flow" / clip.video / f"pair_{clip.frames[0]:05d}.npy"
    path.rename(path.with_suffix(".bak"))
    with pytest.raises(FrameError, match=r"or set source\.on_missing=repeat or skip"):
        dataset[(0, 0), (0, 2)]
    path.with_suffix(".bak").rename(path)
