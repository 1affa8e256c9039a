"""A device with memory of its own: parameters, microbatches and gradients are copied, on streams beside the one that
computes. Gradients leave while backward goes on, bucket by bucket."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distrain.devices.backward import Backward
from distrain.devices.device import Batch, Buffers, There
from distrain.exchange.layout import Bucket, Layout, Span, views
from distrain.exchange.memory import Published, PushSlots


class Event(Protocol):
    """A mark in a stream, as torch.cuda.Event has it."""

    def synchronize(self) -> None:
        """Wait until all that the stream was given before it is done."""
        ...


class Stream(Protocol):
    """Work in order, as torch.cuda.Stream has it."""

    def record_event(self) -> Event:
        """Mark what it was given so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """Have what it is given from now on wait for a mark of another stream."""
        ...

    def synchronize(self) -> None:
        """Wait until all it was given is done."""
        ...


class Accelerator(Protocol):
    """A GPU, as far as StreamedDevice needs one. Nothing waits for what it is asked for but `synchronize`, of streams
    and events."""

    type: str

    @property
    def compute(self) -> Stream:
        """The stream that models compute on."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def on(self, stream: Stream) -> AbstractContextManager[Any]:
        """What this thread asks for within goes to this stream."""
        ...

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the device, zeroed."""
        ...

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Copy between host and device, on the thread's stream."""
        ...

    def bring(self, tensor: Tensor) -> Tensor:
        """A copy on the device, on the thread's stream; by way of page-locked memory that nobody else has."""
        ...

    def fetch(self, tensor: Tensor) -> Tensor:
        """A copy in page-locked memory of the host, on the thread's stream. The tensor has to live until it is done."""
        ...

    def keep_for(self, stream: Stream, tensor: Tensor) -> None:
        """Do not reuse a tensor's memory before what this stream was given until the tensor's end is done."""
        ...

    def page_lock(self, tensor: Tensor) -> bool:
        """Page-lock host memory, so that copies of it need no detour. False where that cannot be had."""
        ...

    def unlock(self, tensor: Tensor) -> None:
        """Undo `page_lock`."""
        ...

    def seed(self, seed: int) -> None:
        """Seed the device's generator."""
        ...


@dataclass(frozen=True)
class Brought:
    """A microbatch on its way."""

    batch: Batch
    there: Event  # after its last copy


class StreamedDevice:
    """Computes on an accelerator.

    Three streams: one computes, one brings microbatches, one takes gradients back. Each waits for the others by events,
    and the host only in `finish`.
    """

    is_ahead = True
    copy_s = 0.0

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.type = accelerator.type
        self._compute, self._arrivals, self._departures = (
            accelerator.compute,
            accelerator.stream(),
            accelerator.stream(),
        )
        self._locked: dict[int, Tensor] = {}  # address -> host memory that is page-locked, or could not be
        self._is_locked: dict[int, bool] = {}

    def open(
        self, model: nn.Module, layout: Layout, published: Sequence[Published], slots: PushSlots, early: bool = False
    ) -> None:
        zeros = self._accelerator.zeros
        # Gradients are copied from within backward in any case, and `finish` says when they are there.
        self._published, self._slots = published, slots
        self._floats = zeros([layout.num_floats], torch.float32)  # what was published
        self._ints = zeros([layout.num_ints], torch.int64)
        self._sums = zeros([layout.num_floats], torch.float32)  # what is to be pushed
        self._layout = layout
        for parameter, view in zip(model.parameters(), views(self._floats, layout.parameters), strict=True):
            parameter.data = view
        for buffer in model.buffers():  # in place: losses may hold one of them too
            buffer.data = zeros(buffer.shape, buffer.dtype)
        self._buffers = Buffers(model, layout)
        counters = [self._ints[e.start_int : e.start_int + e.numel].view(e.shape) for e in layout.int_buffers]
        self._buffers.follow(views(self._floats, layout.float_buffers), counters)
        self._gradients = views(self._sums, layout.parameters)
        self._changes = views(self._sums, layout.float_buffers)
        self._counts = views(self._sums, layout.int_buffers)
        self._backward = Backward(model, layout, self._put, early=True)
        self._departed: list[tuple[Span, Event]] = []  # with marks after their copies
        self._held: tuple[int, int] | None = None  # (version, round) of what was published last
        self._slot: Tensor | None = None  # the push slot that the microbatch under way fills

    def read(self, version: int, round_number: int) -> None:
        if self._held == (version, round_number):
            return
        self._held, published = (version, round_number), self._published[version]
        self._lock(published.memory())
        with self._accelerator.on(self._compute):
            self._accelerator.copy(self._floats, published.floats)
            if len(self._ints):
                self._accelerator.copy(self._ints, published.ints)

    def load_buffers(self) -> None:
        self._buffers.load()

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # the user's code may draw on the host
        self._accelerator.seed(seed)

    def bring(self, batch: Batch) -> Brought:
        with self._accelerator.on(self._arrivals):
            brought = {name: self._accelerator.bring(tensor) for name, tensor in batch.items()}
        return Brought(brought, self._arrivals.record_event())

    def take(self, brought: Brought) -> Batch:
        self._compute.wait_event(brought.there)
        for tensor in brought.batch.values():
            self._accelerator.keep_for(self._compute, tensor)
        return brought.batch

    def begin(self, slot: int, scale: float, there: There) -> None:
        self._slot, self._there = self._slots[slot], there
        self._lock(self._slot)
        self._departed.clear()
        self._backward.begin(scale)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._backward.run(loss, is_last)

    def value(self, loss: Tensor) -> Callable[[], float]:
        loss = loss.detach()
        self._departures.wait_event(self._compute.record_event())
        with self._accelerator.on(self._departures):
            fetched = self._accelerator.fetch(loss)
        return partial(_waited_for, self._departures.record_event(), fetched, loss)

    def finish(self, rows: int) -> None:
        for bucket in self._backward.rest():
            self._put(bucket)
        if self._layout.has_buffers:
            self._buffers.add_changes(self._changes, self._counts, rows)
            self._depart(Span(self._layout.num_gradients, self._layout.num_floats))
        for span, copied in self._departed:
            start = time.perf_counter()
            copied.synchronize()
            self.copy_s += time.perf_counter() - start
            self._there(span)

    def close(self) -> None:
        self._departures.synchronize()
        self._compute.synchronize()
        for address, tensor in self._locked.items():
            if self._is_locked[address]:
                self._accelerator.unlock(tensor)
        self._locked.clear()

    def _put(self, bucket: Bucket) -> None:
        with self._accelerator.on(self._compute):  # in autograd's thread it may be another one
            self._backward.put(bucket, self._gradients)
        self._depart(bucket.span)

    def _depart(self, span: Span) -> None:
        """Copy a part of the sums to the push slot, after what was computed so far."""
        assert self._slot is not None
        self._departures.wait_event(self._compute.record_event())
        with self._accelerator.on(self._departures):
            self._accelerator.copy(self._slot[span.start : span.stop], self._sums[span.start : span.stop])
        self._departed.append((span, self._departures.record_event()))

    def _lock(self, tensor: Tensor) -> None:
        """Page-lock shared memory when it is first used: of many push slots only those that are."""
        address = tensor.data_ptr()
        if address not in self._locked:
            self._locked[address] = tensor
            self._is_locked[address] = self._accelerator.page_lock(tensor)


def _waited_for(there: Event, fetched: Tensor, _: Tensor) -> float:
    """A fetched value. Its source is held on to until then."""
    there.synchronize()
    return fetched.item()
