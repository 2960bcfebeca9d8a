"""The numbers about held-out clips: formulas written out, and the clips that a rank encodes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdistill.builders import make_clip_dataset
from mmdistill.config import ConfigError
from mmdistill.training.monitoring import (
    NUM_CLIPS,
    describe_held_out,
    effective_rank,
    encode_clips,
    held_out_metrics,
    is_due,
    mean_std,
    select_positions,
    try_on_all_ranks,
)
from tests.tiny_training import distill_config


def test_mean_std_is_that_of_the_formula() -> None:
    x = np.random.default_rng(0).normal(size=(7, 3))
    expected = np.mean([math.sqrt(sum((v - column.mean()) ** 2 for v in column) / 7) for column in x.T])
    assert mean_std(torch.tensor(x)) == pytest.approx(expected)


def test_effective_rank_is_that_of_the_formula() -> None:
    """exp(-sum p log p), p = s / sum s, with the singular values s from the eigenvalues of the scatter matrix."""
    x = np.random.default_rng(1).normal(size=(9, 4)) * [3, 1, 0.5, 0.1] + 7
    centered = x - x.mean(axis=0)
    singular = np.sqrt(np.linalg.eigvalsh(centered.T @ centered))
    p = singular / singular.sum()
    assert effective_rank(torch.tensor(x)) == pytest.approx(math.exp(-(p * np.log(p)).sum()))


def test_effective_rank_of_known_features() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert effective_rank(signs + 5) == pytest.approx(2)  # two equal singular values
    assert effective_rank(torch.arange(5.0)[:, None] * torch.tensor([1.0, 2.0, -4.0])) == pytest.approx(1)
    assert effective_rank(torch.full((5, 3), 0.25)) == 0
    assert math.isnan(effective_rank(signs * torch.nan))


def test_metrics_and_their_log_line() -> None:
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    metrics = held_out_metrics(signs, (0.5, 2.0))
    assert metrics == pytest.approx(
        {"held_out_loss": 0.5, "held_out_constant_baseline_loss": 2.0, "feature_std": 1.0, "effective_rank": 2.0}
    )
    line = "held-out loss 0.5000 (constant baseline 2.0000, ratio 0.250), feature std 1, effective rank 2.0"
    assert describe_held_out(metrics) == line
    assert "(constant baseline 0.0000, constant target)" in describe_held_out(held_out_metrics(signs, (0.5, 0.0)))
    assert describe_held_out(held_out_metrics(signs, None)) == "feature std 1, effective rank 2.0"


def test_positions_are_spread_over_all_clips() -> None:
    assert select_positions(3) == [0, 1, 2]
    many = select_positions(1000)
    assert (len(many), len(set(many)), many[0], many[-1]) == (NUM_CLIPS, NUM_CLIPS, 0, 999)


def test_epochs_of_a_validation() -> None:
    assert [epoch for epoch in range(7) if is_due(3, epoch)] == [2, 5]
    assert not is_due(None, 0)
    assert not is_due(0, 0)


def test_why_something_cannot_be_made() -> None:
    def fail() -> int:
        raise ConfigError("no labels")

    assert try_on_all_ranks(fail) == "no labels"
    assert try_on_all_ranks(lambda: 3) == 3


def test_each_rank_encodes_its_share(tiny_clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ranks call `encode` equally often for 7 clips; a clip whose file is missing gives the reason."""
    data = distill_config(tiny_clips).data_module
    dataset = make_clip_dataset(data, ("rgb",), training=False, masked=True, seed=0)
    positions = [0, 1, 2, 3, 1, 2, 3][: len(dataset)]
    shares: list[list[int]] = []
    for rank in range(3):
        monkeypatch.setattr("mmdistill.training.monitoring.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("mmdistill.training.monitoring.get_world_size", lambda: 3)
        batches: list[int] = []

        def encode(batch: dict[str, torch.Tensor], batches: list[int] = batches) -> list[torch.Tensor]:
            batches += batch["index"].tolist()
            return [batch["index"][:, None].double()]

        with pytest.raises(KeyError):  # of the clips of other ranks, which this process does not have
            encode_clips(dataset, positions, encode, batch_size=1)
        shares.append(batches)
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == set(positions)
    monkeypatch.undo()
    found = encode_clips(dataset, [3, 1], lambda batch: [batch["index"][:, None]], batch_size=3)
    assert [x.tolist() for x in found] == [[[3.0], [1.0]]]
    monkeypatch.setattr(type(dataset.readers["rgb"]), "read", _missing)
    found = encode_clips(dataset, [3, 1], lambda batch: [batch["index"]], batch_size=3)
    assert isinstance(found, str)
    assert "frame 3 is missing" in found


def _missing(*_: object) -> None:
    from mmdistill.data.readers.base import MissingFileError

    raise MissingFileError("frame 3 is missing")
