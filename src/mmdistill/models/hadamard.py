"""Hadamard matrices: entries of +1 and -1, orthogonal rows."""

import math

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor:
    """A Hadamard matrix, float64 (order, order): ``H @ H.T = order * I``.

    It is built with the constructions of Sylvester (order 2 n from order n) and Paley (order q + 1 or 2 (q + 1), q
    prime). They give, among others, each multiple of 4 up to 48, and the widths of all common encoders: 128, 192, 384,
    512, 768, 1024, 1152, 1280, 1408.

    Raises:
        ValueError: these constructions give no matrix of this order.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 4 == 0 and _is_prime(order - 1):
        return _paley_first(order - 1)
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return _paley_second(order // 2 - 1)
    if order != 2 and (order < 4 or order % 4):
        raise ValueError(f"the constructions give no Hadamard matrix of order {order}")
    return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard(order // 2))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(q: int) -> Tensor:
    """(q, q): 1 where row - column is a nonzero square modulo the prime q, 0 on the diagonal, -1 elsewhere."""
    character = -torch.ones(q, dtype=torch.float64)
    character[[value * value % q for value in range(1, q)]] = 1
    character[0] = 0
    number = torch.arange(q)
    return character[(number[:, None] - number) % q]


def _paley_first(q: int) -> Tensor:
    """Order q + 1 of a prime q with q % 4 = 3."""
    matrix = torch.eye(q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += _jacobsthal(q)
    return matrix


def _paley_second(q: int) -> Tensor:
    """Order 2 (q + 1) of a prime q with q % 4 = 1."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1, 1
    conference[1:, 1:] = _jacobsthal(q)
    off_diagonal = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, off_diagonal) + torch.kron(torch.eye(q + 1, dtype=torch.float64), diagonal)
