"""Shared buffers, and a model's vectors in them. Buffers are anonymous (memfd): they have no name to guess and vanish
with the last process that holds them."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor, nn

from distrain.exchange.layout import Layout, views

_FLOAT_BYTES = 4


class SharedBuffer:
    """Anonymous memory that other processes of this host may map. Zeroed at the start.

    It lives as long as somebody holds it; `close`, as this object's end, gives up the file descriptor, not the mapping.
    """

    fd = -1

    def __init__(self, num_bytes: int, fd: int | None = None) -> None:
        self.num_bytes = max(num_bytes, mmap.PAGESIZE)
        if fd is None:
            fd = os.memfd_create("distrain", os.MFD_CLOEXEC)
            os.ftruncate(fd, self.num_bytes)
        self.fd = fd
        self._map = mmap.mmap(fd, self.num_bytes)

    def floats(self, start_byte: int, count: int) -> Tensor:
        """`count` float32 values as a tensor over this memory."""
        return torch.frombuffer(self._map, dtype=torch.float32, offset=start_byte, count=count)

    def ints(self, start_byte: int, count: int) -> Tensor:
        """`count` int64 values as a tensor over this memory."""
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        return torch.frombuffer(self._map, dtype=torch.int64, offset=start_byte, count=count)

    def words(self, count: int) -> memoryview:
        """The first `count` int32 values."""
        return memoryview(self._map)[: 4 * count].cast("i")

    def close(self) -> None:
        """Close the file descriptor; tensors over the memory stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class Published:
    """The published vector of a layout: parameters and buffers as everybody reads them.

    Lives in a SharedBuffer, mapped by the server, or a host's relay, and by every worker of that host; a worker without
    either on its host has one of its own, which frames fill.
    """

    def __init__(self, layout: Layout, fd: int | None = None) -> None:
        self.layout = layout
        self.buffer = SharedBuffer(layout.published_bytes, fd)
        self.floats = self.buffer.floats(0, layout.num_floats)
        self.ints = self.buffer.ints(layout.vector_bytes, layout.num_ints)

    def bytes(self) -> memoryview:
        """The whole of it as raw bytes, for a frame."""
        return memoryview(self.buffer._map)[: self.layout.published_bytes]

    def memory(self) -> Tensor:
        """The whole of it as uint8 values."""
        return torch.frombuffer(self.buffer._map, dtype=torch.uint8)

    def span_bytes(self, start: int, stop: int) -> memoryview:
        """The raw bytes of the values [start, stop); where they are the vector's last, its integers come along."""
        end = self.layout.published_bytes if stop == self.layout.num_floats else stop * _FLOAT_BYTES
        return memoryview(self.buffer._map)[start * _FLOAT_BYTES : end]

    def copy_from(self, other: Published) -> None:
        """Take over the values of another one of the same layout."""
        self.floats.copy_(other.floats)
        self.ints.copy_(other.ints)

    def adopt_parameters(self, model: nn.Module, copy_in: bool) -> None:
        """Make the model's parameters views into this memory; with `copy_in`, bring their values along."""
        for (_, parameter), view in zip(
            model.named_parameters(), views(self.floats, self.layout.parameters), strict=True
        ):
            if copy_in:
                view.copy_(parameter.data)
            parameter.data = view

    def int_views(self) -> list[Tensor]:
        """The integer buffers' exact values, each in its own shape."""
        return [self.ints[e.start_int : e.start_int + e.numel].view(e.shape) for e in self.layout.int_buffers]

    def named(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its name, as views."""
        layout = self.layout
        floats = (*layout.parameters, *layout.float_buffers)
        named = {entry.name: view for entry, view in zip(floats, views(self.floats, floats), strict=True)}
        integers = zip(layout.int_buffers, self.int_views(), strict=True)
        return {**named, **{entry.name: view for entry, view in integers}}

    def store_buffers(self, model: nn.Module) -> None:
        """Publish the values of the model's buffers."""
        named = self.named()
        for name, buffer in model.named_buffers():
            named[name].copy_(buffer)


class PushSlots:
    """The vectors in which one worker sums up its gradients, each of `layout.num_floats` float32 values.

    There are `num_sets` sets of `set_size` slots: a set for each round that may be in flight. Memory is given only to
    the slots that are touched. Each begins on a page, so that it can be page-locked apart from the others. A slot that
    is used again within a round gets another number, since what was made of the first push may still be on its way.
    """

    def __init__(self, layout: Layout, set_size: int, num_sets: int = 1, fd: int | None = None) -> None:
        self._layout = layout
        self._stride = -(-layout.vector_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._set_size, self.num_sets = set_size, num_sets
        self.num_slots = set_size * num_sets
        self.buffer = SharedBuffer(self._stride * self.num_slots, fd)
        self._vectors = [self.buffer.floats(slot * self._stride, layout.num_floats) for slot in range(self.num_slots)]

    def __getitem__(self, number: int) -> Tensor:
        return self._vectors[self.place(number)]

    def of_set(self, number: int) -> range:
        """The slots of a set, by their first numbers."""
        return range(number * self._set_size, (number + 1) * self._set_size)

    def renumbered(self, number: int) -> int:
        """Another number of the same slot."""
        return number + self.num_slots

    def place(self, number: int) -> int:
        """Which slot a number stands for."""
        return number % self.num_slots

    def bytes(self, number: int) -> memoryview:
        """A slot's raw bytes, for a frame."""
        start = self.place(number) * self._stride
        return memoryview(self.buffer._map)[start : start + self._layout.vector_bytes]
