"""L1 and L2 penalties on a model's weights."""

from __future__ import annotations

import torch
from torch import nn

from distrain.config import PenaltyConfig
from distrain.learning.optimizers import is_spared


class Penalty:
    """l1 sum |w| + l2 sum w^2 over a model's trainable weights, without biases and the parameters of normalization
    layers (Goodfellow et al. 2016, section 7.1). Its gradient is l1 sign(w) + 2 l2 w, with sign(0) = 0."""

    def __init__(self, model: nn.Module, config: PenaltyConfig) -> None:
        self._l1, self._l2 = config.l1, config.l2
        spared = is_spared(model)
        self._weights = [p for name, p in model.named_parameters() if p.requires_grad and not spared(name, p)]

    @torch.no_grad()
    def add_gradient(self) -> float:
        """Add the penalty's gradient to the weights' gradients, and return the penalty."""
        value = 0.0
        for weight in self._weights:
            if weight.grad is None:  # of another server's slice
                continue
            if self._l1:
                value += self._l1 * float(weight.abs().sum(dtype=torch.float64))
                weight.grad.add_(weight.sign(), alpha=self._l1)
            if self._l2:
                value += self._l2 * float(weight.square().sum(dtype=torch.float64))
                weight.grad.add_(weight, alpha=2 * self._l2)
        return value


def build_penalty(model: nn.Module, config: PenaltyConfig) -> Penalty | None:
    """The penalty that the configuration asks for, if any."""
    return Penalty(model, config) if config.l1 or config.l2 else None
