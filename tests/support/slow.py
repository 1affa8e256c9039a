"""Models whose time is a sleep: machines of a cluster, simulated on one."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor, nn


class _Sleep(nn.Module):
    def __init__(self, seconds: float, flag: str, slower: float) -> None:
        super().__init__()
        self._seconds, self._flag, self._slower = seconds, flag, slower

    def forward(self, hidden: Tensor) -> Tensor:
        if self._flag and self.training:
            try:
                Path(self._flag).touch(exist_ok=False)
                self._seconds *= self._slower
            except FileExistsError:
                pass
            self._flag = ""
        time.sleep(self._seconds)
        return hidden


def build(seconds: float = 0.01, flag: str = "", slower: float = 4.0) -> nn.Module:
    """A small classifier of 4 features and 3 classes, with dropout, that takes so long for a microbatch. Where `flag`
    is given, the worker that first makes this file takes `slower` times as long."""
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), _Sleep(seconds, flag, slower), nn.Linear(8, 3))
