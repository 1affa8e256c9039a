"""Models whose time is a sleep: machines of a cluster, simulated on one."""

from __future__ import annotations

import time

from torch import Tensor, nn


class _Sleep(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def forward(self, hidden: Tensor) -> Tensor:
        time.sleep(self._seconds)
        return hidden


def build(seconds: float = 0.01) -> nn.Module:
    """A small classifier of 4 features and 3 classes, with dropout, that takes so long for a microbatch."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), _Sleep(seconds), nn.Linear(8, 3))
