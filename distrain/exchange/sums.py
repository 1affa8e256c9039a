"""Vectors on their way between hosts, in pieces: sums to the owners of slices, and parameters back from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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


Key = tuple[int, int]
"""A sum: (host, its number for it)."""


def open_frame(round_: int, step: int, count: int, host: int, number: int, block: Block) -> Frame:
    """What says that pieces of a host's sum of this number follow: over a block of the `count` places of a round."""
    return Frame(Kind.OPEN, round_, step, block.first, block.stop, slot=host, version=number, samples=count)


def sum_frame(round_: int, host: int, number: int, block: Block, digest: int, part: Partial) -> Frame:
    """What says that a host's sum of this number has been sent, and is of pushes of this digest."""
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


def piece_frame(round_: int, host: int, number: int, piece: Span) -> Frame:
    """What says that a piece of a host's sum of this number is there."""
    return Frame(Kind.PIECE, round_, first=piece.start, stop=piece.stop, slot=host, version=number)


def send_piece(
    hub: Hub, wire: Wire, round_: int, host: int, number: int, vector: Tensor, piece: Span, link: SocketLink
) -> None:
    """Send a piece of a host's sum of this number."""
    frame = piece_frame(round_, host, number, piece)
    frame.payload = wire.pack_sum(vector, piece)
    hub.send(link, frame, bulk=True, then=partial(wire.sent, frame.payload))


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
class Coming:
    """A sum over the slice of an owner, as far as it has come: its `pieces`. `memory` is what is to be given back,
    where it does not stay where it is; `opened` the frame that said what it is of."""

    vector: Tensor
    memory: memoryview | None = None
    opened: Frame | None = None
    pieces: list[Span] = field(default_factory=list)

    @property
    def block(self) -> Block:
        """The places that it is over."""
        assert self.opened is not None
        return Block(self.opened.first, self.opened.stop)


class Incoming:
    """The sums that hosts send to the owner of a slice. They are told apart by their host and its number for them."""

    def __init__(self, wire: Wire, span: Span) -> None:
        self._wire, self._span = wire, span
        self._coming: dict[Key, Coming] = {}

    def place(self, piece: Frame) -> memoryview:
        """Where a piece's payload goes."""
        memory = self._of(piece).memory
        assert memory is not None
        return self._wire.sum_place(memory, self._span, Span(piece.first, piece.stop))

    def open(self, what: Frame, vector: Tensor | None) -> None:
        """A sum begins. Where `vector` is given, it is of the owner's own host, and its values come to lie there."""
        if vector is not None:
            self._coming[_key(what)] = Coming(vector)
        self._of(what).opened = what

    def take(self, piece: Frame) -> Span:
        """A piece has come. Returns its place in the slice."""
        coming, span = self._coming[_key(piece)], Span(piece.first, piece.stop)
        if coming.memory is not None:
            self._wire.unpack_sum(piece.payload, coming.memory, self._span, span)
        coming.pieces.append(Span(span.start - self._span.start, span.stop - self._span.start))
        return coming.pieces[-1]

    def of(self, round_: int) -> dict[Key, Coming]:
        """What has begun to come of a round, and is not yet said to be whole."""
        return {k: c for k, c in self._coming.items() if c.opened is not None and c.opened.round == round_}

    def whole(self, what: Frame) -> Coming:
        """A sum, all of whose pieces came before the frame that says so. The caller gives it back."""
        coming = self._coming.pop(_key(what), None)
        came = sum(map(len, coming.pieces)) if coming is not None else 0
        if coming is None or coming.opened is None or came != len(self._span):
            raise LinkError(f"of a sum of {len(self._span)} values, {came} came")
        return coming

    def give_back(self, coming: Coming) -> None:
        """Nobody reads a sum any more."""
        if coming.memory is not None:
            self._wire.pool.give(coming.memory)

    def drop(self, what: Frame) -> None:
        """A sum is of no use. To be called when none of its pieces is being received."""
        if (coming := self._coming.pop(_key(what), None)) is not None:
            self.give_back(coming)

    def lose(self, host: int) -> list[Key]:
        """A host is gone: what it began to send never becomes whole. Returns what that is."""
        lost = [key for key in self._coming if key[0] == host]
        for key in lost:
            del self._coming[key]
        return lost

    def _of(self, what: Frame) -> Coming:
        if _key(what) not in self._coming:
            memory = self._wire.pool.take(_FLOAT_BYTES * len(self._span))
            self._coming[_key(what)] = Coming(torch.frombuffer(memory, dtype=torch.float32), memory)
        return self._coming[_key(what)]


def _key(what: Frame) -> Key:
    return what.slot, what.version
