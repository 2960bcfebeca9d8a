"""The order of the clips, a pure function of seed, epoch, rank and world size. A resumed run gets the same order."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from mmdistill.errors import format_count
from mmdistill.randomness import seeded_rng


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, clip number) for one rank. Over all ranks each clip occurs once per epoch.

    `batch_size` is per rank. With ``shuffle=False`` the clips are in their own order. With `drop_last` the last
    `num_dropped` clips of the order, which do not fill a batch on every rank, are dropped; these are different clips in
    each epoch. Otherwise they are split over the ranks, so that some ranks may have a smaller batch or one batch less.

    Raises:
        ValueError: an argument is invalid; names it.
    """

    def __init__(
        self,
        num_clips: int,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        if num_clips < 0 or batch_size < 1 or world_size < 1:
            raise ValueError(
                f"num_clips={num_clips}, batch_size={batch_size}, world_size={world_size}: each must be positive"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in [0, world_size={world_size})")
        self.num_clips, self.batch_size, self.seed, self.shuffle = num_clips, batch_size, seed, shuffle
        self._step, self._first = batch_size * world_size, rank * batch_size
        self._num_full, tail = divmod(num_clips, self._step)
        self.num_dropped = tail if drop_last else 0
        shares = [tail * r // world_size for r in (rank, rank + 1)]
        self._tail = range(0) if drop_last else range(*(self._num_full * self._step + share for share in shares))
        self.set_state(0, 0)

    def set_state(self, epoch: int, start_batch: int) -> None:
        """Set epoch and batch where the next iteration starts.

        Raises:
            ValueError: the position is after the end of the epoch.
        """
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(
                f"epoch={epoch}, start_batch={start_batch}: an epoch has {format_count(len(self), 'batch')}"
            )
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a full epoch on this rank, independent of `start_batch`."""
        return self._num_full + bool(self._tail)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.num_clips)
        if self.shuffle:
            order = seeded_rng(self.seed, self.epoch, "order").permutation(self.num_clips)
        for batch in range(self.start_batch, len(self)):
            yield [(self.epoch, int(order[i])) for i in self.positions(batch)]

    def positions(self, batch: int) -> range:
        """Positions of the clips of a batch of this rank in the order of the epoch."""
        first = batch * self._step + self._first
        return range(first, first + self.batch_size) if batch < self._num_full else self._tail
