"""A small net, of whose parameters some get no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from distrain.exchange.layout import Layout


class PartlyTrained(nn.Module):
    """A frozen layer, one that the loss does not depend on, and two that it does; `norm` has buffers."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.first, self.frozen, self.unused, self.last = (nn.Linear(3, 3) for _ in range(4))
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3) if norm else nn.Identity()
        self.reached: Callable[[Tensor], None] | None = None  # called once backward is at the first layer

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        if self.reached is not None and hidden.requires_grad:
            hidden.register_hook(self.reached)
        return self.last(self.norm(self.frozen(hidden)))


def assert_holds_gradients(
    vector: Tensor, layout: Layout, model: nn.Module, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """That a pushed vector holds a model's gradients; zero where it has none."""
    for entry in layout.parameters:
        gradient = model.get_parameter(entry.name).grad
        got = vector[entry.start : entry.start + entry.numel].view(entry.shape)
        expected = torch.zeros(entry.shape) if gradient is None else gradient
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=entry.name)
