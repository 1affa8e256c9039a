"""Gradient clipping, by global norm and by value (Pascanu, Mikolov, Bengio 2013, "On the difficulty of training
recurrent neural networks", algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distrain.config import ClipConfig

_BLOCK = 4096  # values summed by one thread: the result does not depend on how many threads there are


def global_norm(gradients: Tensor) -> float:
    """The L2 norm of a flat float32 tensor, in float64: squares of large finite values do not overflow.

    Not finite exactly when some value is not.
    """
    whole = len(gradients) // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(gradients[:whole].view(-1, _BLOCK), dim=1, dtype=torch.float64)
    rest = torch.linalg.vector_norm(gradients[whole:], dtype=torch.float64)
    return math.sqrt(sum(value * value for value in [*blocks.tolist(), rest.item()]))


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
