"""What vectors look like on links between hosts: float32, as they lie in memory, or half of that.

As bfloat16, gradients are rounded where they are computed and added up (see rounding.py), so that sending them loses
nothing; parameters are rounded by the server that owns them, and every worker of the run, on its own host too, computes
with the rounded ones. The server goes on from its float32 parameters: what the rounding of one update took is in the
next one's (error feedback: what was sent so far and what was meant differ by one rounding), and needs no state beside
them. The model's buffers, such as BatchNorm's statistics, are few, and travel as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from distrain.exchange.layout import Layout, Span
from distrain.exchange.memory import Published
from distrain.exchange.pool import Pool
from distrain.exchange.rounding import Dither
from distrain.reduction import Block, Finish

WireDtype = Literal["fp32", "bf16"]
_FLOAT_BYTES, _HALF_BYTES = 4, 2


class Wire:
    """Vectors as float32. Nothing is copied, and nothing rounded."""

    rounds = False

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self.pool = Pool()

    # Gradients

    def rounding(self, step: int, start: int = 0) -> Finish | None:
        """What is done to a node of the tree over the shards of a step once it is added up, where anything is. `start`
        is the place in the whole vector of the first value of the nodes'."""
        return None

    def pack_sum(self, vector: Tensor, piece: Span) -> Any:
        """A piece of a whole summed vector, bytes-like, to be sent, and then given to `sent`."""
        return vector[piece.start : piece.stop].numpy()

    def sent(self, payload: Any) -> None:
        """What `pack_sum` gave is sent."""

    def sum_place(self, memory: memoryview, span: Span, piece: Span) -> memoryview:
        """Where a piece of a sum is to be received, whose float32 values over a span come to lie in `memory`."""
        return memory[_FLOAT_BYTES * (piece.start - span.start) : _FLOAT_BYTES * (piece.stop - span.start)]

    def unpack_sum(self, payload: memoryview, memory: memoryview, span: Span, piece: Span) -> None:
        """Bring the values of a piece that was received there into `memory`."""

    # Parameters

    def round_parameters(self, published: Published, span: Span) -> None:
        """Make a span of the parameters what can be sent. (To be called before `parameters` is.)"""

    def parameters(self, published: Published, span: Span) -> memoryview:
        """A span of the parameters, to be sent, or to be received into; with the vector's end come its integers."""
        return published.span_bytes(span.start, span.stop)

    def unpack_parameters(self, published: Published, span: Span) -> None:
        """Let workers read a span that was received."""


class RoundedWire(Wire):
    """Gradients and parameters as bfloat16."""

    rounds = True

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self._dither = Dither()
        self._images: dict[Published, bytearray] = {}

    def rounding(self, step: int, start: int = 0) -> Finish | None:
        def finish(block: Block, values: Tensor, first: int) -> None:
            place = start + first
            self._dither.round_(values[: max(0, self._layout.num_gradients - place)], step, block, place)

        return finish

    def pack_sum(self, vector: Tensor, piece: Span) -> Any:
        payload = self.pool.take(self._sum_bytes(piece))
        halves, rest = self._split(payload, piece)
        halves.copy_(vector[piece.start : piece.start + len(halves)])
        rest.copy_(vector[piece.stop - len(rest) : piece.stop])
        return payload

    def sent(self, payload: memoryview) -> None:
        self.pool.give(payload)

    def sum_place(self, memory: memoryview, span: Span, piece: Span) -> memoryview:
        return self.pool.take(self._sum_bytes(piece))

    def unpack_sum(self, payload: memoryview, memory: memoryview, span: Span, piece: Span) -> None:
        vector = _tensor(memory, torch.float32, _FLOAT_BYTES * (piece.start - span.start), len(piece))
        halves, rest = self._split(payload, piece)
        vector[: len(halves)].copy_(halves)
        vector[len(halves) :].copy_(rest)
        self.pool.give(payload)

    def round_parameters(self, published: Published, span: Span) -> None:
        halves, values = self._halves(published, span)
        halves.copy_(values)
        values.copy_(halves)
        tail = self._tail(span)
        self._in_image(published, tail)[:] = published.span_bytes(tail.start, tail.stop)

    def parameters(self, published: Published, span: Span) -> memoryview:
        return self._in_image(published, span)

    def unpack_parameters(self, published: Published, span: Span) -> None:
        halves, values = self._halves(published, span)
        values.copy_(halves)
        tail = self._tail(span)
        published.span_bytes(tail.start, tail.stop)[:] = self._in_image(published, tail)

    def _sum_bytes(self, piece: Span) -> int:
        """The size of a piece of a sum."""
        halves = self._num_halves(piece)
        return _HALF_BYTES * halves + _FLOAT_BYTES * (len(piece) - halves)

    def _num_halves(self, span: Span) -> int:
        """How many values of a span are gradients or parameters."""
        return max(0, min(span.stop, self._layout.num_gradients) - span.start)

    def _split(self, payload: memoryview, piece: Span) -> tuple[Tensor, Tensor]:
        """The bfloat16 and the float32 values of a piece of a sum."""
        count = self._num_halves(piece)
        rest = len(piece) - count
        return _tensor(payload, torch.bfloat16, 0, count), _tensor(payload, torch.float32, _HALF_BYTES * count, rest)

    def _image(self, published: Published) -> bytearray:
        """What a published vector is on the wire: bfloat16 parameters, then float32 buffers and integers."""
        if published not in self._images:
            saved = (_FLOAT_BYTES - _HALF_BYTES) * self._layout.num_gradients
            self._images[published] = bytearray(self._layout.published_bytes - saved)
        return self._images[published]

    def _halves(self, published: Published, span: Span) -> tuple[Tensor, Tensor]:
        """The parameters of a span, on the wire and as workers read them."""
        count = self._num_halves(span)
        halves = _tensor(self._image(published), torch.bfloat16, _HALF_BYTES * span.start, count)
        return halves, published.floats[span.start : span.start + count]

    def _tail(self, span: Span) -> Span:
        """The values of a span that are the model's buffers, and travel as they are."""
        return Span(max(span.start, self._layout.num_gradients), max(span.stop, self._layout.num_gradients))

    def _in_image(self, published: Published, span: Span) -> memoryview:
        """A span of an image; where it is the vector's last, its integers come along."""
        start, stop = (
            _HALF_BYTES * value + (_FLOAT_BYTES - _HALF_BYTES) * max(0, value - self._layout.num_gradients)
            for value in (span.start, span.stop)
        )
        image = memoryview(self._image(published))
        return image[start:] if span.stop == self._layout.num_floats else image[start:stop]


def _tensor(memory: memoryview | bytearray, dtype: torch.dtype, start_byte: int, count: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, offset=start_byte, count=count)


WIRES: dict[str, Callable[[Layout], Wire]] = {"fp32": Wire, "bf16": RoundedWire}
"""By `server.wire_dtype`."""
