"""What vectors look like on links between hosts: float32, as they lie in memory, or half of that.

As bfloat16, gradients are rounded where they are computed and added up (see rounding.py), so that sending them loses
nothing; parameters are rounded by the server that owns them, and every worker of the run, on its own host too, computes
with the rounded ones. The server goes on from its float32 parameters: what the rounding of one update took is in the
next one's (error feedback: what was sent so far and what was meant differ by one rounding), and needs no state beside
them. The model's buffers, such as BatchNorm's statistics, are few, and travel as float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from distrain.exchange.memory import Layout, Published
from distrain.exchange.pool import Pool
from distrain.exchange.rounding import Dither
from distrain.exchange.slices import Span
from distrain.reduction import Block, Finish, Partial

WireDtype = Literal["fp32", "bf16"]
_FLOAT_BYTES, _HALF_BYTES = 4, 2


class Carrier(Protocol):
    """A link, as far as it matters here."""

    @property
    def sending(self) -> bool: ...


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

    def sum_bytes(self, span: Span) -> int:
        """The size of a sum over a span."""
        return _FLOAT_BYTES * len(span)

    def pack_sum(self, vector: Tensor, span: Span, link: Carrier) -> Any:
        """A span of a whole summed vector, bytes-like, to be sent on this link."""
        return vector[span.start : span.stop].numpy()

    def unpack_sum(self, payload: memoryview, span: Span) -> tuple[Tensor, memoryview]:
        """The float32 values of a span that came in memory of `pool`, and the memory to give back after use."""
        return torch.frombuffer(payload, dtype=torch.float32), payload

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
        self._sent: list[tuple[Carrier, memoryview]] = []

    def rounding(self, step: int, start: int = 0) -> Finish | None:
        def finish(block: Block, part: Partial) -> None:
            self._dither.round_(part.vector[: max(0, self._layout.num_gradients - start)], step, block, start)

        return finish

    def sum_bytes(self, span: Span) -> int:
        halves = self._num_halves(span)
        return _HALF_BYTES * halves + _FLOAT_BYTES * (len(span) - halves)

    def pack_sum(self, vector: Tensor, span: Span, link: Carrier) -> Any:
        for sent in [sent for sent in self._sent if not sent[0].sending]:
            self._sent.remove(sent)
            self.pool.give(sent[1])
        payload = self.pool.take(self.sum_bytes(span))
        self._sent.append((link, payload))
        halves, rest = self._split(payload, span)
        halves.copy_(vector[span.start : span.start + len(halves)])
        rest.copy_(vector[span.stop - len(rest) : span.stop])
        return payload

    def unpack_sum(self, payload: memoryview, span: Span) -> tuple[Tensor, memoryview]:
        memory = self.pool.take(_FLOAT_BYTES * len(span))
        vector = torch.frombuffer(memory, dtype=torch.float32)
        halves, rest = self._split(payload, span)
        vector[: len(halves)].copy_(halves)
        vector[len(halves) :].copy_(rest)
        self.pool.give(payload)
        return vector, memory

    def round_parameters(self, published: Published, span: Span) -> None:
        halves, values = self._halves(published, span)
        halves.copy_(values)
        values.copy_(halves)
        if span.stop == self._layout.num_floats:
            self._tail_of_image(published)[:] = self._tail(published)

    def parameters(self, published: Published, span: Span) -> memoryview:
        image = memoryview(self._image(published))
        start = _HALF_BYTES * min(span.start, self._layout.num_gradients)
        return image[start:] if span.stop == self._layout.num_floats else image[start : _HALF_BYTES * span.stop]

    def unpack_parameters(self, published: Published, span: Span) -> None:
        halves, values = self._halves(published, span)
        values.copy_(halves)
        if span.stop == self._layout.num_floats:
            self._tail(published)[:] = self._tail_of_image(published)

    def _num_halves(self, span: Span) -> int:
        """How many values of a span are gradients or parameters."""
        return max(0, min(span.stop, self._layout.num_gradients) - span.start)

    def _split(self, payload: memoryview, span: Span) -> tuple[Tensor, Tensor]:
        """The bfloat16 and the float32 values of a sum over a span."""
        count = self._num_halves(span)
        rest = len(span) - count
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

    def _tail(self, published: Published) -> memoryview:
        return published.bytes()[_FLOAT_BYTES * self._layout.num_gradients :]

    def _tail_of_image(self, published: Published) -> memoryview:
        return memoryview(self._image(published))[_HALF_BYTES * self._layout.num_gradients :]


def _tensor(memory: memoryview | bytearray, dtype: torch.dtype, start_byte: int, count: int) -> Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, offset=start_byte, count=count)


WIRES: dict[str, Callable[[Layout], Wire]] = {"fp32": Wire, "bf16": RoundedWire}
"""By `server.wire_dtype`."""
