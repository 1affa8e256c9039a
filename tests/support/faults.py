"""Models that end their own worker's process at a chosen moment of a step, once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distrain.data import reader
from distrain.exchange.link import Kind, SocketLink
from tests.support.slow import Sleep

_HUNGRY_BYTES = 3 << 30
MOMENTS = ("reading", "forward", "backward", "pushing", "pushed")
_STEP = 6


def build(moment: str | None = None, flag: str = "", until: str = "") -> nn.Module:
    """An MLP of 4 features and 3 classes. Whoever makes the file `flag` first dies at `moment` of about step 6; without
    a flag everybody does, each time. Steps are slow until there is a file `until`, if it is given. Moment "relay": a
    relay dies before it joins."""
    if moment == "relay" and b"RelayActor" in Path("/proc/self/cmdline").read_bytes():
        _die(flag)
    layers = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), _Probe(moment, flag)]
    return nn.Sequential(*layers, *([Sleep(0.02, until=until)] if until else []), nn.Linear(16, 3))


class _Probe(nn.Module):
    def __init__(self, moment: str | None, flag: str) -> None:
        super().__init__()
        self._moment, self._flag, self._calls = moment, flag, 0

    def forward(self, hidden: Tensor) -> Tensor:
        self._calls += self.training
        if self._calls == 1 and self.training:
            self._set_trap()
        if self._calls == _STEP and self.training:
            if self._moment == "forward":
                _die(self._flag)
            if self._moment == "backward":
                hidden = hidden.clone()
                hidden.register_hook(lambda _: _die(self._flag))
        if self._moment == "start" and self.training:
            _die(self._flag)
        if self._moment == "memory" and self._calls >= _STEP and self.training and _claim(self._flag):
            self._hoard = bytearray(os.urandom(1 << 20) * (_HUNGRY_BYTES >> 20))
            time.sleep(10)  # for whoever watches memory
        return hidden

    def _set_trap(self) -> None:
        """In a worker's process alone: the driver builds the model too, and is a process of other tests as well."""
        flag = self._flag
        if self._moment == "reading":
            _before(reader._Stream, "fill", lambda calls, *_: calls == 2 and _die(flag))
        elif self._moment in ("pushing", "pushed"):
            _instead_of_send(self._moment, flag)


def _die(flag: str) -> None:
    if _claim(flag):
        os.kill(os.getpid(), signal.SIGKILL)


def _claim(flag: str) -> bool:
    """Whether this process is the first that asks, or there is no flag."""
    if not flag:
        return True
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _before(owner: Any, name: str, act: Any) -> None:
    original, calls = getattr(owner, name), 0

    def replaced(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        act(calls, *arguments)
        return original(*arguments)

    setattr(owner, name, replaced)


def _instead_of_send(moment: str, flag: str) -> None:
    original, calls = SocketLink.send, 0

    def send(link: SocketLink, frame: Any, *how: Any) -> None:
        nonlocal calls
        calls += frame.kind is Kind.PUSH
        if frame.kind is Kind.PUSH and calls == _STEP and moment == "pushing" and _claim(flag):
            os.write(link.fileno(), b"\0" * 7)  # a part of a frame
            os.kill(os.getpid(), signal.SIGKILL)
        original(link, frame, *how)
        if frame.kind is Kind.PUSH and calls == _STEP and moment == "pushed":
            _die(flag)

    SocketLink.send = send  # type: ignore[method-assign]
