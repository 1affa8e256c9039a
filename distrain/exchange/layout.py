"""The flat layout of a model: one float32 vector of its parameters, then its floating-point buffers (such as
BatchNorm's statistics), then its integer buffers. Pure."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

from torch import Tensor, nn

PIECE_FLOATS = 524_288  # 2 MiB as float32, 18 ms on 1 Gbit/s: of smaller ones, frames would cost what overlap saves
_LEAST_PIECE_FLOATS = 65_536  # of smaller models, whose vectors are to be several pieces too
_PIECES = 16
ALIGNMENT_BYTES = 64  # where tensors start: kernels may round differently on unaligned memory
_FLOAT_BYTES, _INT_BYTES = 4, 8
_UNIT = ALIGNMENT_BYTES // _FLOAT_BYTES
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Span:
    """Values [start, stop) of the flat vector."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model. `start` counts float32 values from the vector's beginning."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    start_int: int = -1  # integer buffers: where the exact value lies among the published integers


@dataclass(frozen=True, slots=True)
class Bucket:
    """Consecutive parameters of the model, of a piece or more together but for its first ones, side by side in the
    vector."""

    span: Span
    indices: range


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a model lies in its flat vector.

    A pushed vector has `num_floats` float32 values: gradients, then the changes of the buffers. The published one has
    the values themselves, followed by the integer buffers as int64, since float32 counts exactly only to 2**24.

    Entries and buckets are in the model's order. In the vector, buckets are spread (see `spread`), so that each slice
    of it has some from every depth of a model of many: backward reaches the last layers first, and all slices' owners
    are to get gradients from its beginning to its end.
    """

    parameters: tuple[Entry, ...]
    float_buffers: tuple[Entry, ...]
    int_buffers: tuple[Entry, ...]
    buckets: tuple[Bucket, ...]
    num_gradients: int
    num_floats: int
    num_ints: int

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Lay out a model. Parameters and floating-point buffers must be float32 (checked when it was built)."""
        position = 0

        def place(name: str, tensor: Tensor, start_int: int = -1) -> Entry:
            nonlocal position
            entry = Entry(name, tuple(tensor.shape), position, tensor.numel(), start_int)
            position += _extent(tensor)
            return entry

        named = list(model.named_parameters())
        parameters: dict[int, Entry] = {}
        buckets: list[Bucket] = []
        extents = [_extent(parameter) for _, parameter in named]
        for indices in spread(_bucket_indices(extents, _piece_floats(sum(extents)))):
            start = position
            for index in indices:
                parameters[index] = place(*named[index])
            buckets.append(Bucket(Span(start, position), indices))
        num_gradients = position
        buffers = list(model.named_buffers())
        float_buffers = tuple(place(name, buffer) for name, buffer in buffers if buffer.is_floating_point())
        int_buffers: list[Entry] = []
        num_ints = 0
        for name, buffer in buffers:
            if not buffer.is_floating_point():
                int_buffers.append(place(name, buffer, num_ints))
                num_ints += buffer.numel()
        return cls(
            tuple(parameters[index] for index in range(len(named))),
            float_buffers,
            tuple(int_buffers),
            tuple(sorted(buckets, key=lambda bucket: bucket.indices.start)),
            num_gradients,
            position,
            num_ints,
        )

    @cached_property
    def digest(self) -> str:
        """Fingerprint of names, shapes and places: worker and server must agree on it."""
        return hashlib.sha256(repr((self.parameters, self.float_buffers, self.int_buffers)).encode()).hexdigest()

    @property
    def whole(self) -> Span:
        """The whole vector."""
        return Span(0, self.num_floats)

    def pieces(self, span: Span) -> Iterator[Span]:
        """A span in the pieces in which it crosses the wire, about equal ones, from the left. While one is sent, the
        next is got ready, and the one before is unpacked."""
        count = max(1, round(len(span) / _piece_floats(self.num_gradients)))
        size = _aligned(-(-len(span) // count))
        for start in range(span.start, span.stop, max(1, size)):
            yield Span(start, min(start + size, span.stop))

    def parts(self, span: Span) -> list[Span]:
        """What a slice has of each bucket, and of the model's buffers, from the left."""
        starts = [bucket.span.start for bucket in self.buckets if len(bucket.span)] + [self.num_gradients]
        inner = sorted(start for start in starts if span.start < start < span.stop)
        return [Span(start, stop) for start, stop in pairwise([span.start, *inner, span.stop])]

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


def overlaps(spans: Sequence[Span], span: Span) -> Iterator[tuple[int, int]]:
    """Which of these spans, adjacent and from the left, share values with another one: (place, how many)."""
    first = bisect_right(spans, span.start, key=lambda each: each.start) - 1
    for place in range(first, bisect_left(spans, span.stop, key=lambda each: each.start)):
        yield place, min(spans[place].stop, span.stop) - max(spans[place].start, span.start)


def spread(items: Sequence[T]) -> list[T]:
    """The same in the order of their numbers' bits, read from the lowest to the highest (that of a van der Corput
    sequence): of equal parts of what comes out, each has its share of every part of what went in."""
    bits = max(1, (len(items) - 1).bit_length())
    return [items[i] for i in sorted(range(len(items)), key=lambda i: f"{i:0{bits}b}"[::-1])]


def _extent(tensor: Tensor) -> int:
    """How many values of the vector a tensor takes, its padding included."""
    return _aligned(tensor.numel())


def _aligned(num_values: int) -> int:
    return -(-num_values // _UNIT) * _UNIT


def _piece_floats(num_gradients: int) -> int:
    """About how many values a piece has, in a model of so many parameters."""
    return min(PIECE_FLOATS, max(_LEAST_PIECE_FLOATS, num_gradients // _PIECES))


def _bucket_indices(extents: Sequence[int], piece: int) -> list[range]:
    """Cut parameters that take so many values each into buckets of a piece or more. From the last one on, as backward
    comes to them: a layer's bias, which follows its weight, is not to wait for the weight of the layer before."""
    found: list[range] = []
    stop, size = len(extents), 0
    for index in reversed(range(len(extents))):
        size += extents[index]
        if size >= piece or index == 0:
            found.append(range(index, stop))
            stop, size = index, 0
    return found[::-1]
