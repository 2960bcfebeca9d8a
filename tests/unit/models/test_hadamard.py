"""Hadamard matrices, against the definition."""

import pytest
import torch

from mmdistill.models.hadamard import hadamard


@pytest.mark.parametrize("order", [1, 2, *range(4, 49, 4), 128, 192, 384, 512, 768, 1024, 1152, 1280, 1408])
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    matrix = hadamard(order)
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))


@pytest.mark.parametrize("order", [0, 3, 6, 92, 100])  # 92 and 100 have one, by other constructions
def test_other_orders_raise(order: int) -> None:
    with pytest.raises(ValueError, match="no Hadamard matrix of order"):
        hadamard(order)
