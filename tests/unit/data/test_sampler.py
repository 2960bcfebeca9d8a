"""Over all ranks no clip is repeated or lost, and a resumed sampler gives the remaining batches."""

import pytest

from mmdistill.data.sampler import EpochBatchSampler


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 5, 12, 25])
@pytest.mark.parametrize("drop_last", [True, False])
def test_ranks_share_an_epoch(world: int, n: int, drop_last: bool) -> None:
    ranks = [
        EpochBatchSampler(n, batch_size=2, seed=3, rank=r, world_size=world, drop_last=drop_last) for r in range(world)
    ]
    batches = [list(s) for s in ranks]
    assert [len(b) for b in batches] == [len(s) for s in ranks]
    drawn = [i for rank in batches for batch in rank for _, i in batch]
    assert len(drawn) == len(set(drawn)) == n - ranks[0].num_dropped
    assert ranks[0].num_dropped == (n % (2 * world) if drop_last else 0)
    if drop_last:
        assert len({len(b) for b in batches}) == 1
        assert all(len(batch) == 2 for rank in batches for batch in rank)


def test_resumed_sampler_gives_the_remaining_batches() -> None:
    sampler = EpochBatchSampler(23, batch_size=2, seed=1, rank=1, world_size=2)
    sampler.set_state(4, 0)
    batches = list(sampler)
    resumed = EpochBatchSampler(23, batch_size=2, seed=1, rank=1, world_size=2)
    resumed.set_state(4, 3)
    assert list(resumed) == batches[3:]
    assert len(resumed) == len(batches)
    resumed.set_state(5, 0)
    assert [i for b in resumed for _, i in b] != [i for b in batches for _, i in b]


def test_order_without_shuffling() -> None:
    assert list(EpochBatchSampler(5, batch_size=2, seed=0, shuffle=False, drop_last=False)) == [
        [(0, 0), (0, 1)],
        [(0, 2), (0, 3)],
        [(0, 4)],
    ]


def test_order_never_changes() -> None:
    """Another order would change the batches of a resumed run."""
    sampler = EpochBatchSampler(8, batch_size=2, seed=0)
    sampler.set_state(1, 0)
    assert [i for b in sampler for _, i in b] == [2, 1, 6, 0, 7, 4, 5, 3]


def test_invalid_positions_raise() -> None:
    with pytest.raises(ValueError, match="rank=2"):
        EpochBatchSampler(8, batch_size=2, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="start_batch=9"):
        EpochBatchSampler(8, batch_size=2, seed=0).set_state(0, 9)
