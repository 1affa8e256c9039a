"""Shared buffers, and the flat layout of a model in them.

Buffers are anonymous (memfd): they have no name to guess and vanish with the last process that holds them. A model is
laid out as one float32 vector: its parameters, then its floating-point buffers (such as BatchNorm's statistics), then
its integer buffers. Each tensor starts on a 64-byte boundary, since kernels may round differently on unaligned memory.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

ALIGNMENT_BYTES = 64
_FLOAT_BYTES = 4
_INT_BYTES = 8


class SharedBuffer:
    """Anonymous memory that other processes of this host may map. Zeroed at the start.

    It lives as long as somebody holds it; `close` gives up the file descriptor, not the mapping.
    """

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


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model. `start` counts float32 values from the vector's beginning."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    start_int: int = -1  # integer buffers: where the exact value lies among the published integers


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a model lies in its flat vector.

    A pushed vector has `num_floats` float32 values: gradients, then the changes of the buffers. The published one has
    the values themselves, followed by the integer buffers as int64, since float32 counts exactly only to 2**24.
    """

    parameters: tuple[Entry, ...]
    float_buffers: tuple[Entry, ...]
    int_buffers: tuple[Entry, ...]
    num_gradients: int
    num_floats: int
    num_ints: int

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Lay out a model. Parameters and floating-point buffers must be float32 (checked when it was built)."""
        position = 0

        def place(named: Iterable[tuple[str, Tensor]], first_int: int | None = None) -> tuple[Entry, ...]:
            nonlocal position
            entries: list[Entry] = []
            next_int = first_int
            for name, tensor in named:
                entries.append(
                    Entry(name, tuple(tensor.shape), position, tensor.numel(), -1 if next_int is None else next_int)
                )
                if next_int is not None:
                    next_int += tensor.numel()
                unit = ALIGNMENT_BYTES // _FLOAT_BYTES
                position += -(-tensor.numel() // unit) * unit
            return tuple(entries)

        parameters = place(model.named_parameters())
        num_gradients = position
        buffers = list(model.named_buffers())
        float_buffers = place((name, b) for name, b in buffers if b.is_floating_point())
        integers = [(name, b) for name, b in buffers if not b.is_floating_point()]
        int_buffers = place(integers, 0)
        return cls(parameters, float_buffers, int_buffers, num_gradients, position, sum(b.numel() for _, b in integers))

    @cached_property
    def digest(self) -> str:
        """Fingerprint of names, shapes and places: worker and server must agree on it."""
        return hashlib.sha256(repr((self.parameters, self.float_buffers, self.int_buffers)).encode()).hexdigest()

    @property
    def has_buffers(self) -> bool:
        return bool(self.float_buffers or self.int_buffers)

    @property
    def vector_bytes(self) -> int:
        """Bytes of a pushed vector."""
        return self.num_floats * _FLOAT_BYTES

    @property
    def published_bytes(self) -> int:
        """Bytes of the published vector with its integers."""
        return self.vector_bytes + self.num_ints * _INT_BYTES


def views(vector: Tensor, entries: Iterable[Entry]) -> list[Tensor]:
    """Each entry's part of a flat float32 vector, in the tensor's own shape."""
    return [vector[e.start : e.start + e.numel].view(e.shape) for e in entries]


class Published:
    """The published vector of a layout: parameters and buffers as everybody reads them.

    Lives in a SharedBuffer, mapped by the server and by every worker of its host; a worker on another host has one of
    its own, which frames fill.
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

    def store_buffers(self, model: nn.Module) -> None:
        """Publish the values of the model's buffers."""
        named = dict(model.named_buffers())
        for entry, view in zip(self.layout.float_buffers, views(self.floats, self.layout.float_buffers), strict=True):
            view.copy_(named[entry.name])
        for entry, view in zip(self.layout.int_buffers, self.int_views(), strict=True):
            view.copy_(named[entry.name])


class PushSlots:
    """The vectors in which one worker sums up its gradients, each of `layout.num_floats` float32 values.

    There are `num_sets` sets of `set_size` slots: a set for each round that may be in flight. Memory is given only to
    the slots that are touched. Each begins on a page, so that it can be page-locked apart from the others.
    """

    def __init__(self, layout: Layout, set_size: int, num_sets: int = 1, fd: int | None = None) -> None:
        self._layout = layout
        self._stride = -(-layout.vector_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._set_size, self.num_sets = set_size, num_sets
        self.num_slots = set_size * num_sets
        self.buffer = SharedBuffer(self._stride * self.num_slots, fd)
        self._vectors = [self.buffer.floats(slot * self._stride, layout.num_floats) for slot in range(self.num_slots)]

    def __getitem__(self, slot: int) -> Tensor:
        return self._vectors[slot]

    def of_set(self, number: int) -> range:
        """The slots of a set."""
        return range(number * self._set_size, (number + 1) * self._set_size)

    def bytes(self, slot: int) -> memoryview:
        """A slot's raw bytes, for a frame."""
        start = slot * self._stride
        return memoryview(self.buffer._map)[start : start + self._layout.vector_bytes]
