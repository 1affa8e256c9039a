"""Gradient clipping, by global norm and by value (Pascanu, Mikolov, Bengio 2013, "On the difficulty of training
recurrent neural networks", algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from distrain.config import ClipConfig

PIECE = 32_704  # values summed at a time: too few for torch to share among threads, so their number does not matter


class Norm:
    """The L2 norm of float32 values that are added a piece at a time, in float64: squares of large finite values do
    not overflow. Not finite exactly when some value is not."""

    def __init__(self) -> None:
        self._squares: list[float] = []
        # vector_norm's own conversion takes fresh memory from the system each time, which is twice as slow.
        self._wide = torch.empty(PIECE, dtype=torch.float64)

    def add(self, piece: Tensor) -> None:
        """Add the values of a flat float32 tensor of at most PIECE values."""
        norm: float = torch.linalg.vector_norm(self._wide[: len(piece)].copy_(piece)).item()
        self._squares.append(norm * norm)

    def take(self) -> list[float]:
        """The squared norms of the pieces added since the last time, in their order."""
        squares, self._squares = self._squares, []
        return squares


def total_norm(squares: Iterable[float]) -> float:
    """The norm of all pieces together, added up in their order."""
    total = 0.0
    for square in squares:
        total += square
    return math.sqrt(total)


def global_norm(gradients: Tensor) -> float:
    """The L2 norm of a flat float32 tensor."""
    norm = Norm()
    for piece in gradients.split(PIECE):
        norm.add(piece)
    return total_norm(norm.take())


def clip_(gradients: Tensor, clip: ClipConfig | None, norm: float) -> bool:
    """Clip a flat float32 gradient of L2 norm `norm` in place. Returns whether that changed it."""
    if clip is None:
        return False
    if clip.norm is not None:
        return clip_by_global_norm_(gradients, clip.norm, norm)
    assert clip.value is not None
    return clip_by_value_(gradients, clip.value)


def clip_by_global_norm_(gradients: Tensor, max_norm: float, norm: float) -> bool:
    """Scale the gradient to `max_norm` where its norm is larger."""
    if norm <= max_norm:
        return False
    gradients.mul_(max_norm / norm)
    return True


def clip_by_value_(gradients: Tensor, max_value: float) -> bool:
    """Bound each value to [-max_value, max_value]."""
    low, high = torch.aminmax(gradients)
    if low >= -max_value and high <= max_value:
        return False
    gradients.clamp_(-max_value, max_value)
    return True
