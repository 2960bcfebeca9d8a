"""The order of the clips, a pure function of (seed, epoch, rank, world size): a resumed run asks for the same ones."""

from collections.abc import Iterator, Mapping

import numpy as np
from torch.utils.data import Sampler

from mmdistill.randomness import seeded_rng


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, clip number) for one rank.

    Over all ranks each clip occurs once per epoch. With `drop_last` the tail that does not fill a batch on every rank
    is left out (`num_dropped` clips, others each epoch); without it the tail is split over the ranks, some of which may
    then have a smaller batch or one batch less.

    Args:
        n: clips in the dataset.
        batch_size: clips per rank and batch.
        start_batch: batches of the epoch that are skipped, for a resume in its middle.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        n: int,
        *,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        start_batch: int = 0,
    ) -> None:
        if n < 0 or batch_size < 1 or world_size < 1:
            raise ValueError(f"n={n}, batch_size={batch_size}, world_size={world_size}: each must be positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} must lie in [0, world_size={world_size})")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.num_dropped = n % (batch_size * world_size) if drop_last else 0
        self.set_state(epoch, start_batch)

    def set_state(self, epoch: int, start_batch: int) -> None:
        """Go to a place: the next iteration starts there. Raises `ValueError` past the end of the epoch."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ValueError(f"epoch={epoch}, start_batch={start_batch}: an epoch has {len(self)} batches")
        self.epoch, self.start_batch = epoch, start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, whatever `start_batch` is."""
        whole, tail = divmod(self.n, self.batch_size * self.world_size)
        return whole + (not self.drop_last and self._tail(tail).stop > self._tail(tail).start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.n)
        if self.shuffle:
            order = seeded_rng(self.seed, self.epoch, "order").permutation(self.n)
        step = self.batch_size * self.world_size
        whole = self.n // step
        for batch in range(self.start_batch, len(self)):
            if batch < whole:
                first = batch * step + self.rank * self.batch_size
                taken = range(first, first + self.batch_size)
            else:
                taken = range(whole * step, self.n)[self._tail(self.n % step)]
            yield [(self.epoch, int(order[i])) for i in taken]

    def _tail(self, count: int) -> slice:
        """This rank's share of the last `count` clips."""
        return slice(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)


def batch_order_mismatch(epoch: int, other: Mapping[str, tuple[object, object]]) -> str:
    """Why a run cannot go on inside an epoch: what decides its batches was (stored) and is (own) another."""
    told = ", ".join(f"{k} {stored} / {own}" for k, (stored, own) in other.items())
    return (
        f"resume: the checkpoint was written inside epoch {epoch}, whose batches are not those of this run "
        f"(checkpoint / run): {told}; use the same settings, or resume from an epoch's end"
    )
