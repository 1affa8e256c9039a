"""Gradient clipping, by global norm and by value (Pascanu, Mikolov, Bengio 2013, "On the difficulty of training
recurrent neural networks", algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from distrain.config import ClipConfig

PIECE = 32_704  # values summed at a time: too few for torch to share among threads, so their number does not matter


class Norm:
    """The L2 norm of a vector that is given in pieces, flat float32 tensors of at most PIECE values each, in float64:
    squares of large finite values do not overflow. Not finite exactly when some value is not."""

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        # vector_norm's own conversion takes fresh memory from the system each time, which is twice as slow.
        wide = torch.empty(PIECE, dtype=torch.float64)
        self._norms = torch.zeros(len(pieces), dtype=torch.float64)
        self._pieces = [
            (piece, wide[: len(piece)], norm) for piece, norm in zip(pieces, self._norms.unbind(), strict=True)
        ]

    def look(self, first: int = 0, stop: int | None = None) -> None:
        """Take the norms of the pieces [first, stop) as they are now."""
        for piece, wide, norm in self._pieces[first:stop]:
            torch.linalg.vector_norm(wide.copy_(piece), out=norm)

    def squares(self) -> list[float]:
        """The squared norms of all pieces, as last looked at, in their order."""
        return [norm * norm for norm in self._norms.tolist()]


def total_norm(squares: Iterable[float]) -> float:
    """The norm of all pieces together. Their squares are added up exactly, so that their order does not matter."""
    return math.sqrt(math.fsum(squares))


def global_norm(gradients: Tensor) -> float:
    """The L2 norm of a flat float32 tensor."""
    norm = Norm(gradients.split(PIECE))
    norm.look()
    return total_norm(norm.squares())


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
