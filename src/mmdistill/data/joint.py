"""Samples of joint pretraining: a clip of the target and a labeled clip of the source, with the mask of the target."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from mmdistill.data.dataset import ClipDataset
from mmdistill.data.sampler import EpochBatchSampler
from mmdistill.errors import rename_key
from mmdistill.randomness import seeded_rng

Key = tuple[int, int]  # (epoch, clip number); of the source (pass, clip number)


class JointDataset(Dataset[dict[str, Any]]):
    """``ds[target key, source key]``: the sample of the target clip, with the entry ``source``.

    The entry is the sample of the source clip without ``visible``: both clips have the mask of the target clip.
    """

    def __init__(self, target: ClipDataset, source: ClipDataset) -> None:
        self.target, self.source = target, source

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, keys: tuple[Key, Key]) -> dict[str, Any]:
        sample = self.target[keys[0]]
        with rename_key("data_module.", "source."):
            source = self.source[keys[1]]
        del source["visible"]
        return {**sample, "source": source}

    def share_memory(self) -> None:
        """See `ClipDataset.share_memory`."""
        self.target.share_memory()
        self.source.share_memory()


class JointBatchSampler(Sampler[list[tuple[Key, Key]]]):
    """The batches of `target`, with a source clip for each of their clips.

    The source is read in passes. Pass p has each of its `num_source_clips` once, in an order that depends on (seed, p)
    alone. An epoch is one pass over the target and uses the next `clips_per_epoch` clips of the source, so the source
    clip is a pure function of the seed, the epoch and the position in it, for any number of ranks.
    """

    def __init__(self, target: EpochBatchSampler, num_source_clips: int, *, clips_per_epoch: int) -> None:
        self.target, self.num_source_clips, self.clips_per_epoch = target, num_source_clips, clips_per_epoch
        self._pass, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self.target)

    def __iter__(self) -> Iterator[list[tuple[Key, Key]]]:
        first = self.target.epoch * self.clips_per_epoch
        for batch, keys in enumerate(self.target, start=self.target.start_batch):
            positions = self.target.positions(batch)
            yield [(key, self.source_key(first + i)) for key, i in zip(keys, positions, strict=True)]

    def source_key(self, position: int) -> Key:
        """Pass and clip number of the source clip at a position since the start of the training."""
        number, place = divmod(position, self.num_source_clips)
        if number != self._pass:
            rng = seeded_rng(self.target.seed, number, "source order")
            self._pass, self._order = number, rng.permutation(self.num_source_clips)
        return number, int(self._order[place])
