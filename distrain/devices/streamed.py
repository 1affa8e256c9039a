"""A device with memory of its own: parameters, microbatches and gradients are copied, on streams beside the one that
computes.

Gradients leave while backward goes on: parameters form buckets, the last layers' first, and once a bucket's gradients
are all there, one copy takes them to the push slot (as in Li et al. 2020, "PyTorch Distributed", section 3.2.3).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distrain.devices.device import Batch, Buffers, put_gradient
from distrain.exchange.memory import Layout, Published, PushSlots, views

BUCKET_BYTES = 4 << 20


class Stream(Protocol):
    """Work in order, as torch.cuda.Stream has it."""

    def record_event(self) -> Any:
        """Mark what it was given so far."""
        ...

    def wait_event(self, event: Any) -> None:
        """Have what it is given from now on wait for a mark of another stream."""
        ...

    def synchronize(self) -> None:
        """Wait until all it was given is done."""
        ...


class Accelerator(Protocol):
    """A GPU, as far as StreamedDevice needs one. Nothing waits for what it is asked for but `Stream.synchronize`."""

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


@dataclass
class Bucket:
    """The parameters whose gradients lie in [start, stop) of the pushed vector. `missing`: those of them that the
    backward pass under way has not reached."""

    start: int
    stop: int
    indices: frozenset[int]
    missing: set[int] = field(default_factory=set)


def make_buckets(layout: Layout, num_bytes: int = BUCKET_BYTES) -> list[Bucket]:
    """Cut a model's parameters, from the last to the first, into buckets of at least so many bytes (but for the last
    bucket, which gets what is left)."""
    buckets: list[Bucket] = []
    indices: list[int] = []
    stop = layout.num_gradients
    for index in reversed(range(len(layout.parameters))):
        indices.append(index)
        start = layout.parameters[index].start
        if 4 * (stop - start) >= num_bytes or index == 0:
            buckets.append(Bucket(start, stop, frozenset(indices)))
            indices, stop = [], start
    return buckets


@dataclass(frozen=True)
class Brought:
    """A microbatch on its way."""

    batch: Batch
    there: Any  # the event after its last copy


class StreamedDevice:
    """Computes on an accelerator.

    Three streams: one computes, one brings microbatches, one takes gradients back. Each waits for the others by events,
    and the host only in `finish`.
    """

    is_ahead = True
    copy_s = 0.0

    def __init__(self, accelerator: Accelerator, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._accelerator, self._bucket_bytes = accelerator, bucket_bytes
        self.type = accelerator.type
        self._compute, self._arrivals, self._departures = (
            accelerator.compute,
            accelerator.stream(),
            accelerator.stream(),
        )
        self._locked: dict[int, Tensor] = {}  # address -> host memory that is page-locked, or could not be
        self._is_locked: dict[int, bool] = {}

    def open(self, model: nn.Module, layout: Layout, published: Sequence[Published], slots: PushSlots) -> None:
        zeros = self._accelerator.zeros
        self._published, self._slots = published, slots
        self._floats = zeros([layout.num_floats], torch.float32)  # what was published
        self._ints = zeros([layout.num_ints], torch.int64)
        self._sums = zeros([layout.num_floats], torch.float32)  # what is to be pushed
        self._num_gradients = layout.num_gradients
        self._parameters = list(model.parameters())
        for parameter, view in zip(self._parameters, views(self._floats, layout.parameters), strict=True):
            parameter.data = view
        for buffer in model.buffers():  # in place: losses may hold one of them too
            buffer.data = zeros(buffer.shape, buffer.dtype)
        self._buffers = Buffers(model, layout)
        counters = [self._ints[e.start_int : e.start_int + e.numel].view(e.shape) for e in layout.int_buffers]
        self._buffers.follow(views(self._floats, layout.float_buffers), counters)
        self._gradients = views(self._sums, layout.parameters)
        self._changes = views(self._sums, layout.float_buffers)
        self._counts = views(self._sums, layout.int_buffers)
        self._buckets = make_buckets(layout, self._bucket_bytes)
        self._bucket_of = {index: bucket for bucket in self._buckets for index in bucket.indices}
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, index))
        self._held: tuple[int, int] | None = None  # (version, round) of what was published last
        self._slot: Tensor | None = None  # the push slot that the microbatch under way fills
        self._scale, self._is_last = 0.0, False

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

    def begin(self, slot: int, scale: float) -> None:
        self._slot, self._scale, self._is_last = self._slots[slot], scale, False
        self._lock(self._slot)
        for parameter in self._parameters:
            parameter.grad = None
        for bucket in self._buckets:
            bucket.missing = set(bucket.indices)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        self._is_last = is_last
        (loss * self._scale if self._scale else loss).backward()

    def finish(self, rows: int) -> None:
        start = time.perf_counter()
        for bucket in self._buckets:  # what the last loss does not depend on
            if bucket.missing:
                for index in bucket.missing:
                    put_gradient(self._gradients[index], self._parameters[index].grad, self._scale)
                self._depart(bucket.start, bucket.stop)
        if self._num_gradients < len(self._sums):
            self._buffers.add_changes(self._changes, self._counts, rows)
            self._depart(self._num_gradients, len(self._sums))
        self._departures.synchronize()
        self.copy_s += time.perf_counter() - start

    def close(self) -> None:
        self._departures.synchronize()
        self._compute.synchronize()
        for address, tensor in self._locked.items():
            if self._is_locked[address]:
                self._accelerator.unlock(tensor)
        self._locked.clear()

    def _arrived(self, index: int, parameter: Tensor) -> None:
        """A parameter's gradient is there: autograd calls this, from a thread of its own, as soon as it is."""
        if not self._is_last:
            return
        bucket = self._bucket_of[index]
        with self._accelerator.on(self._compute):
            put_gradient(self._gradients[index], parameter.grad, self._scale)
        bucket.missing.discard(index)
        if not bucket.missing:
            self._depart(bucket.start, bucket.stop)

    def _depart(self, start: int, stop: int) -> None:
        """Copy a part of the sums to the push slot, after what was computed so far."""
        assert self._slot is not None
        self._departures.wait_event(self._compute.record_event())
        with self._accelerator.on(self._departures):
            self._accelerator.copy(self._slot[start:stop], self._sums[start:stop])

    def _lock(self, tensor: Tensor) -> None:
        """Page-lock shared memory when it is first used: of many push slots only those that are."""
        address = tensor.data_ptr()
        if address not in self._locked:
            self._locked[address] = tensor
            self._is_locked[address] = self._accelerator.page_lock(tensor)
