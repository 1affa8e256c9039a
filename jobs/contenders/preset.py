"""A model whose gradient costs next to nothing to compute, so that a step is its exchange and its update; and sleep,
which stands for computing where the hosts of a benchmark share one machine."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn


class _Preset(torch.autograd.Function):
    """Passes on what it is given. The weight's gradient is there after `seconds`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, gradient: Tensor, seconds: float) -> Tensor:
        ctx.gradient, ctx.seconds = gradient, seconds
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.seconds:
            time.sleep(ctx.seconds)
        return gradients[0], ctx.gradient, None, None


class Preset(nn.Module):
    """`floats` parameters in so many equal tensors, each a layer. The output does not depend on them, and the gradient
    is constant. A forward pass takes `seconds`, and a backward pass `backward_seconds`, the same for each layer."""

    def __init__(self, floats: int, tensors: int, seconds: float = 0.0, backward_seconds: float = 0.0) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(floats // tensors) for _ in range(tensors))
        self._seconds, self._layer_seconds = seconds, backward_seconds / tensors
        self._gradients: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        time.sleep(self._seconds)
        if not self._gradients:
            self._gradients = [torch.full_like(weight, 1e-3) for weight in self.weights]
        output = features.sum(1, keepdim=True)
        for weight, gradient in zip(self.weights, self._gradients, strict=True):
            output = _Preset.apply(output, weight, gradient, self._layer_seconds)  # type: ignore[no-untyped-call]
        return output


def build(floats: int, tensors: int, seconds: float = 0.0, backward_seconds: float = 0.0) -> nn.Module:
    """The model, for `model.factory`."""
    return Preset(floats, tensors, seconds, backward_seconds)
