"""Models whose time is a sleep: machines of a cluster, simulated on one, and runs that wait for what a test does."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor, nn


class Sleep(nn.Module):
    """Takes so long for a microbatch, and passes it on.

    Where `flag` is given, the worker that first makes this file takes `slower` times as long. Where `until` is given,
    nobody sleeps any more once this file exists: a test makes it when all that it waits for has happened, and then the
    run is over soon.
    """

    def __init__(self, seconds: float, flag: str = "", slower: float = 1.0, until: str = "") -> None:
        super().__init__()
        self._seconds, self._flag, self._slower, self._until = seconds, flag, slower, until

    def forward(self, hidden: Tensor) -> Tensor:
        if self._flag and self.training:
            try:
                Path(self._flag).touch(exist_ok=False)
                self._seconds *= self._slower
            except FileExistsError:
                pass
            self._flag = ""
        if self._until and Path(self._until).exists():
            self._seconds = 0.0
        time.sleep(self._seconds)
        return hidden


def build(seconds: float = 0.01, flag: str = "", slower: float = 4.0, until: str = "") -> nn.Module:
    """A small classifier of 4 features and 3 classes, with dropout, that sleeps: see Sleep."""
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), Sleep(seconds, flag, slower, until), nn.Linear(8, 3)
    )
