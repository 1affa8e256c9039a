"""A GPU made of the host's memory, which shows up what nobody waited for.

What goes to the stream that computes happens at once. Copies on other streams are put off as long as the streams' rules
allow: until somebody waits. Meanwhile their targets hold NaN (integers: 0), so that whoever reads too early computes
nonsense; and whoever overwrites a source too early has the copy take the wrong values along.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from distrain.errors import TrainingError


@dataclass
class FakeEvent:
    """A mark in a stream: its copies up to `number`, and how often each piece of device memory had been written."""

    stream: FakeStream
    number: int
    versions: dict[int, int]

    def synchronize(self) -> None:
        self.stream.run(self.number)


@dataclass
class FakeStream:
    gpu: FakeGpu
    computes: bool
    waited_for: dict[int, int] = field(default_factory=dict)  # the versions that copies may count on
    pending: deque[tuple[int, Callable[[], None]]] = field(default_factory=deque)
    numbers: Iterator[int] = field(default_factory=count)
    last: int = -1

    def record_event(self) -> FakeEvent:
        return FakeEvent(self, self.last, self.gpu.versions() if self.computes else {})

    def wait_event(self, event: FakeEvent) -> None:
        self.waited_for |= event.versions
        event.stream.run(event.number)

    def synchronize(self) -> None:
        self.run(self.last)

    def ask(self, work: Callable[[], None]) -> None:
        self.last = next(self.numbers)
        self.pending.append((self.last, work))

    def run(self, number: int) -> None:
        while self.pending and self.pending[0][0] <= number:
            self.pending.popleft()[1]()


class FakeGpu:
    """An Accelerator for StreamedDevice. `log` has what was asked of it, in order."""

    type = "cpu"

    def __init__(self) -> None:
        self.compute = FakeStream(self, computes=True)
        self.memory: dict[int, Tensor] = {}
        self.locked: dict[int, int] = {}  # address -> bytes
        self.log: list[str] = []
        self.brought = self.kept = 0
        self._here = threading.local()

    def stream(self) -> FakeStream:
        return FakeStream(self, computes=False)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before = self._current
        self._here.stream = stream
        yield
        self._here.stream = before

    @property
    def _current(self) -> FakeStream:
        return getattr(self._here, "stream", self.compute)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(tuple(shape), dtype=dtype)
        self.memory[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def versions(self) -> dict[int, int]:
        return {address: tensor._version for address, tensor in self.memory.items()}

    def copy(self, into: Tensor, source: Tensor) -> None:
        if self._current.computes:
            self.log.append("load")
            into.copy_(source)
            return
        address = source.untyped_storage().data_ptr()
        if self._current.waited_for.get(address) != self.memory[address]._version:
            raise TrainingError("copied before it was computed")  # an error that a worker tells the server
        self.log.append("depart")
        self._put_off(into, source)

    def bring(self, tensor: Tensor) -> Tensor:
        if self._current.computes:
            raise TrainingError("a microbatch comes in on a stream of its own")
        self.log.append("bring")
        self.brought += 1
        brought = torch.empty_like(tensor)
        self._put_off(brought, tensor.clone())
        return brought

    def fetch(self, tensor: Tensor) -> Tensor:
        if self._current.computes:
            raise TrainingError("the host would wait for all that is computed")
        self.log.append("fetch")
        fetched = torch.empty_like(tensor)
        self._put_off(fetched, tensor)
        return fetched

    def _put_off(self, into: Tensor, source: Tensor) -> None:
        into.fill_(torch.nan if into.is_floating_point() else 0)
        self._current.ask(lambda: into.copy_(source))

    def keep_for(self, stream: FakeStream, tensor: Tensor) -> None:
        self.kept += stream is self.compute

    def page_lock(self, tensor: Tensor) -> bool:
        pages = {page for start, size in self.locked.items() for page in _pages(start, size)}
        if pages & set(_pages(tensor.data_ptr(), tensor.nbytes)):
            raise TrainingError("a page is locked twice")
        self.locked[tensor.data_ptr()] = tensor.nbytes
        return True

    def unlock(self, tensor: Tensor) -> None:
        del self.locked[tensor.data_ptr()]

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)


def _pages(start: int, num_bytes: int) -> range:
    return range(start // 4096, (start + num_bytes - 1) // 4096 + 1)
