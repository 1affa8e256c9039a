"""Gradient clipping, by global norm and by value (Pascanu, Mikolov, Bengio 2013, "On the difficulty of training
recurrent neural networks", algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrain.config import ClipConfig

PIECE = 24_576  # values summed at a time: too few for torch to share among threads, so their number does not matter


def global_norm(gradients: Tensor) -> float:
    """The L2 norm of a flat float32 tensor, in float64: squares of large finite values do not overflow.

    Not finite exactly when some value is not.
    """
    return math.sqrt(sum(squared_norm(piece) for piece in gradients.split(PIECE)))


def squared_norm(piece: Tensor) -> float:
    """The square of the L2 norm of at most PIECE float32 values, in float64."""
    norm: float = torch.linalg.vector_norm(piece, dtype=torch.float64).item()
    return norm * norm


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
