"""Vectors on their way between hosts, in pieces: sums to the owners of slices, and parameters back from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distrain.errors import LinkError
from distrain.exchange.layout import Span
from distrain.exchange.link import Frame, Hub, Kind, SocketLink
from distrain.exchange.memory import Published
from distrain.exchange.wire import Wire
from distrain.reduction import Block, Partial

_FLOAT_BYTES = 4


def sum_frame(round_: int, host: int, number: int, block: Block, digest: int, part: Partial) -> Frame:
    """What says that the pieces of a host's sum of this number are a sum over a block of places, of pushes of this
    digest."""
    return Frame(
        Kind.SUM,
        round_,
        first=block.first,
        stop=block.stop,
        slot=host,
        version=number,
        read=digest,
        samples=part.samples,
        loss=part.loss,
        weight=part.weight,
        squares=part.squares,
    )


def partial_of(frame: Frame) -> Partial:
    """What a push or sum says beside its vector."""
    return Partial(None, frame.samples, frame.loss, frame.weight, squares=frame.squares)


def send_piece(
    hub: Hub, wire: Wire, round_: int, host: int, number: int, vector: Tensor, piece: Span, link: SocketLink
) -> None:
    """Send a piece of a host's sum of this number."""
    payload = wire.pack_sum(vector, piece)
    frame = Frame(Kind.PIECE, round_, first=piece.start, stop=piece.stop, slot=host, version=number, payload=payload)
    hub.send(link, frame, bulk=True, then=partial(wire.sent, payload))


def send_parameters(
    hub: Hub, wire: Wire, published: Published, version: int, read: int, span: Span, links: Sequence[SocketLink]
) -> None:
    """Send a span of the vector `published`, which is that of this version and holds the parameters after update
    `read`."""
    for piece in published.layout.pieces(span):
        payload = wire.parameters(published, piece)
        frame = Frame(Kind.PUBLISH, first=piece.start, stop=piece.stop, version=version, read=read, payload=payload)
        for link in links:
            hub.send(link, frame, bulk=True)


def withdraw_parameters(version: int, links: Iterable[SocketLink]) -> None:
    """Do not send what a link has not sent yet of this version of the parameters: it is about to be overwritten."""
    for link in links:
        link.withdraw(lambda frame: frame.kind is Kind.PUBLISH and frame.version == version)


@dataclass(eq=False)
class _Coming:
    """A sum of which not all has come. `num_floats` have."""

    memory: memoryview
    num_floats: int = 0


class Incoming:
    """The sums that hosts send to the owner of a slice. They are told apart by their host and its number for them."""

    def __init__(self, wire: Wire, span: Span) -> None:
        self._wire, self._span = wire, span
        self._coming: dict[tuple[int, int], _Coming] = {}
        self._lent: dict[int, list[memoryview]] = {}  # by round
        self._own: dict[tuple[int, int], Tensor] = {}  # of the owner's host, which stay where they are

    def place(self, piece: Frame) -> memoryview:
        """Where a piece's payload goes."""
        key = piece.slot, piece.version
        if key not in self._coming:
            self._coming[key] = _Coming(self._wire.pool.take(_FLOAT_BYTES * len(self._span)))
        return self._wire.sum_place(self._coming[key].memory, self._span, Span(piece.first, piece.stop))

    def take(self, piece: Frame) -> None:
        """A piece has come."""
        coming = self._coming[piece.slot, piece.version]
        self._wire.unpack_sum(piece.payload, coming.memory, self._span, Span(piece.first, piece.stop))
        coming.num_floats += piece.stop - piece.first

    def keep(self, what: Frame, vector: Tensor) -> None:
        """The owner's own host has a sum."""
        self._own[what.slot, what.version] = vector

    def whole(self, what: Frame) -> Tensor:
        """The float32 values of a sum, all of whose pieces came before the frame that says what it is: on loan until
        its round is forgotten."""
        if (own := self._own.pop((what.slot, what.version), None)) is not None:
            return own
        coming = self._coming.pop((what.slot, what.version), None)
        if coming is None or coming.num_floats != len(self._span):
            came = 0 if coming is None else coming.num_floats
            raise LinkError(f"of a sum of {len(self._span)} values, {came} came")
        self._lent.setdefault(what.round, []).append(coming.memory)
        return torch.frombuffer(coming.memory, dtype=torch.float32)

    def drop(self, what: Frame) -> None:
        """A sum is of no use. To be called when none of its pieces is being received."""
        key = what.slot, what.version
        self._own.pop(key, None)
        if (coming := self._coming.pop(key, None)) is not None:
            self._wire.pool.give(coming.memory)

    def forget(self, is_over: Callable[[int], bool]) -> None:
        """Nobody reads the sums of these rounds any more."""
        for number in [number for number in self._lent if is_over(number)]:
            for memory in self._lent.pop(number):
                self._wire.pool.give(memory)

    def lose(self, host: int) -> None:
        """A host is gone: what it began to send never becomes whole."""
        for key in [key for key in self._coming if key[0] == host]:
            del self._coming[key]
