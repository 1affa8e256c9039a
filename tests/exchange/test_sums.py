"""Sums on their way to the owner of a slice: whole only with all their pieces, each in memory of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from distrain.errors import LinkError
from distrain.exchange.layout import Layout, Span
from distrain.exchange.link import Frame, Hub, Kind
from distrain.exchange.memory import Published
from distrain.exchange.sums import (
    Coming,
    Incoming,
    open_frame,
    piece_frame,
    send_parameters,
    send_piece,
    sum_frame,
    withdraw_parameters,
)
from distrain.exchange.wire import WIRES, Wire
from distrain.reduction import Block, Partial
from tests.support.links import socket_pair

LAYOUT = Layout.of(nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 7)))
SPAN = Span(512, LAYOUT.num_floats)
BLOCK = Block(2, 4)


class Owner:
    """Stands in for the hub, and for the link to the owner of a slice, which takes what it is sent when told to."""

    sending = False

    def __init__(self, wire_dtype: str = "fp32") -> None:
        self.wire = WIRES[wire_dtype](LAYOUT)
        self.incoming = Incoming(self.wire, SPAN)
        self.sent: list[Frame] = []

    def send(self, link: Owner, frame: Frame, bulk: bool = False, then: Callable[[], None] | None = None) -> None:
        frame.payload = bytes(memoryview(frame.payload).cast("B"))
        link.sent.append(frame)
        if then is not None:
            then()

    def take(self, frame: Frame) -> Span | None:
        if frame.kind is Kind.OPEN:
            return self.incoming.open(frame, None)
        place = self.incoming.place(frame)
        place[:] = frame.payload
        frame.payload = place
        return self.incoming.take(frame)

    def send_sum(self, value: float, host: int = 1, number: int = 0, round_: int = 5) -> list[Frame]:
        """The frames of a sum, all of whose values are this."""
        vector = torch.full([LAYOUT.num_floats], value)
        self.send(self, open_frame(round_, 4, 8, host, number, BLOCK))
        for piece in LAYOUT.pieces(SPAN):
            send_piece(self, self.wire, round_, host, number, vector, piece, self)  # type: ignore[arg-type]
        self.send(self, sum_frame(round_, host, number, BLOCK, 77, Partial(None, 3, 0.5, 2.0, squares=9.0)))
        sent, self.sent = self.sent, []
        return sent


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr("distrain.exchange.layout.PIECE_FLOATS", 256)


@pytest.mark.parametrize("wire_dtype", WIRES)
def test_sums_that_cross_are_told_apart(wire_dtype: str):
    owner = Owner(wire_dtype)
    of_each = [owner.send_sum(1.0), owner.send_sum(2.0, host=2), owner.send_sum(3.0, number=1)]
    for row in zip(*of_each, strict=True):
        for frame in row:
            if frame.kind is not Kind.SUM:
                owner.take(frame)
    for value, frames in enumerate(of_each, start=1):
        what = frames[-1]
        assert (what.kind, what.first, what.stop, what.read) == (Kind.SUM, 2, 4, 77)
        assert (what.samples, what.loss, what.weight, what.squares) == (3, 0.5, 2.0, 9.0)
        coming = owner.incoming.whole(what)
        assert coming.block == BLOCK and coming.opened is frames[0]
        assert torch.equal(coming.vector, torch.full([len(SPAN)], float(value)))


def test_what_has_come_of_a_round_is_known_piece_by_piece():
    owner = Owner()
    opened, first, second, *_ = owner.send_sum(1.0)
    early, *_ = owner.send_sum(1.0, round_=6, number=1)
    for frame in (opened, early):
        owner.take(frame)
    [(key, coming)] = owner.incoming.of(5).items()
    assert key == (1, 0) and coming.pieces == []
    spans = [owner.take(frame) for frame in (first, second)]
    assert coming.pieces == spans and spans[0] == Span(0, 256) and spans[1].start == 256, "places in the slice"


def test_parameters_that_are_no_longer_there_are_not_sent():
    a, b = socket_pair("tcp")
    hub, published, sent = Hub("a test's token"), [Published(LAYOUT), Published(LAYOUT)], []
    hub.send = lambda link, frame, bulk: link.send(frame, bulk)  # type: ignore[method-assign]
    a.send(Frame(Kind.PUBLISH, payload=bytes(64 << 20)), bulk=True)  # which takes a while
    for read in range(6):
        withdraw_parameters(read % 2, [a])
        send_parameters(hub, Wire(LAYOUT), published[read % 2], read % 2, read, SPAN, [a])
    hub.close()

    def read_all() -> None:
        while len(sent) < 1 + 2 * len(list(LAYOUT.pieces(SPAN))) and (frame := b.receive(5)) is not None:
            sent.append(frame)

    reader = threading.Thread(target=read_all)
    reader.start()
    while a.sending:
        a.flush()
    reader.join()
    assert [(frame.read, frame.first) for frame in sent[1:]] == [
        (read, piece.start) for read in (4, 5) for piece in LAYOUT.pieces(SPAN)
    ], "the last of each version"
    a.close()
    b.close()


def test_a_sum_that_is_void_gives_its_memory_back():
    owner = Owner()
    opened, first, *_, what = owner.send_sum(1.0)
    owner.take(opened)
    owner.take(first)
    owner.incoming.drop(Frame(Kind.VOID, slot=1, version=0))
    assert not owner.incoming._coming and owner.wire.pool._free
    owner.incoming.drop(Frame(Kind.VOID, slot=1, version=7))  # of which nothing came
    with pytest.raises(LinkError, match="0 came"):
        owner.incoming.whole(what)


def test_the_sum_of_the_owners_own_host_stays_where_it_is():
    owner, vector = Owner(), torch.zeros(len(SPAN))
    what = sum_frame(5, 1, 0, BLOCK, 77, Partial(None, 3, 0.5, 2.0))
    owner.incoming.open(open_frame(5, 4, 8, 1, 0, BLOCK), vector)
    assert owner.incoming.take(piece_frame(5, 1, 0, SPAN)) == Span(0, len(SPAN))
    assert owner.incoming.whole(what).vector is vector
    owner.incoming.open(open_frame(5, 4, 8, 1, 0, BLOCK), vector)
    owner.incoming.drop(what)
    assert not owner.wire.pool._free, "no memory of the pool's"


def test_a_sum_that_lacks_a_piece_is_an_error():
    owner = Owner()
    opened, first, *_, what = owner.send_sum(1.0)
    with pytest.raises(LinkError, match=f"of a sum of {len(SPAN)} values, 0 came"):
        owner.incoming.whole(what)
    owner.take(opened)
    owner.take(first)
    with pytest.raises(LinkError, match=f"of a sum of {len(SPAN)} values, 256 came"):
        owner.incoming.whole(what)


def test_memory_is_used_again_once_it_is_given_back_or_the_sum_is_dropped():
    owner = Owner()

    def arrive(number: int) -> Coming:
        *frames, what = owner.send_sum(1.0, number=number)
        for frame in frames:
            owner.take(frame)
        return owner.incoming.whole(what)

    first, second = arrive(0), arrive(1)
    assert first.vector.data_ptr() != second.vector.data_ptr()
    owner.incoming.give_back(first)
    *frames, what = owner.send_sum(1.0, number=2)  # in the first one's
    for frame in frames:
        owner.take(frame)
    owner.incoming.drop(what)
    assert arrive(3).vector.data_ptr() == first.vector.data_ptr()


def test_what_a_lost_host_began_to_send_is_forgotten():
    owner = Owner()
    lost, other = owner.send_sum(1.0, host=1), owner.send_sum(2.0, host=2)
    for frame in (*lost[:2], *other[:2]):
        owner.take(frame)
    assert owner.incoming.lose(1) == [(1, 0)]
    for frame in other[2:-1]:
        owner.take(frame)
    assert (owner.incoming.whole(other[-1]).vector == 2.0).all()
    with pytest.raises(LinkError, match="0 came"):
        owner.incoming.whole(lost[-1])
