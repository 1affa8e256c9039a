"""What a host sends to the owners of slices, word by word of its workers. Whole runs: server/test_hosts.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distrain.exchange.host_sums import HostSums
from distrain.exchange.layout import Layout, Span
from distrain.exchange.link import Frame, Kind, rows_digest
from distrain.exchange.memory import PushSlots
from distrain.exchange.slices import cut
from distrain.exchange.sums import Incoming
from distrain.exchange.wire import Wire

LAYOUT = Layout.of(nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 2)))
SHARDS = 4
LEFT, RIGHT = 7, 8  # incarnations of the workers that compute shards 2 and 3
ROUND = 5
HOST = 3
WHOLE = Span(0, LAYOUT.num_floats)


class Scripted:
    """A host of two workers, without sockets; of the slices, the last is its own where there are two. `sums` are those
    that went out: (first, stop, digest, values of the whole vector)."""

    def __init__(self, num_slices: int = 1) -> None:
        self.spans = cut(LAYOUT, num_slices)
        own = num_slices - 1 if num_slices > 1 else None
        self.links = [Mock() for _ in self.spans]  # whose withdrawing is a test of theirs
        links = {slice_: link for slice_, link in enumerate(self.links) if slice_ != own}
        self.wire = Wire(LAYOUT)
        self.host = HostSums(LAYOUT, self.wire, self, num_slices, own, links, self.keep)  # type: ignore[arg-type]
        self.host.number = HOST
        self.owners = [Incoming(self.wire, span) for span in self.spans]
        self.sent: list[tuple[int, Kind]] = []  # to the other owners
        self.kept: list[Kind] = []  # said to our own
        self.came: dict[int, list[Tensor]] = {}
        self.sums: list[tuple[int, int, int, np.ndarray]] = []
        self.slots = {incarnation: PushSlots(LAYOUT, SHARDS, 1) for incarnation in (LEFT, RIGHT)}
        for incarnation, slots in self.slots.items():
            self.host.joined(incarnation, slots)

    def send(self, link: Any, frame: Frame, bulk: bool, then: Callable[[], None] | None = None) -> None:
        slice_ = self.links.index(link)
        assert frame.slot == HOST and bulk
        self.sent.append((slice_, frame.kind))
        owner = self.owners[slice_]
        if frame.kind is Kind.PIECE:
            place = owner.place(frame)
            place[:] = memoryview(frame.payload).cast("B")
            frame.payload = place
        self._take(owner, frame)

    def keep(self, what: Frame, vector: Tensor | None) -> None:
        self.kept.append(what.kind)
        self._take(self.owners[-1], what, vector)

    def _take(self, owner: Incoming, what: Frame, vector: Tensor | None = None) -> None:
        match what.kind:
            case Kind.OPEN:
                assert what.samples == SHARDS
                owner.open(what, vector)
            case Kind.PIECE:
                owner.take(what)
            case Kind.VOID:
                owner.drop(what)
            case _:
                coming = owner.whole(what)
                assert (coming.block.first, coming.block.stop) == (what.first, what.stop)
                self._arrived(what, coming.vector.clone())

    def _arrived(self, what: Frame, values: Tensor) -> None:
        vectors = self.came.setdefault(what.version, [])
        vectors.append(values)
        if len(vectors) == len(self.spans):
            self.sums.append((what.first, what.stop, what.read, np.concatenate(vectors)))

    @property
    def num_pieces(self) -> int:
        return sum(kind is Kind.PIECE for _, kind in self.sent)

    @property
    def num_voided(self) -> int:
        return sum(kind is Kind.VOID for _, kind in self.sent)

    def ask(self, incarnation: int, place: int, round_: int = ROUND) -> None:
        task = Frame(Kind.TRAIN, round_, first=place, stop=place + 1, incarnation=incarnation, samples=SHARDS)
        self.host.asked(task)

    def ready(self, incarnation: int, place: int, value: float, span: Span, slot: int = 0) -> None:
        self.slots[incarnation][slot][span.start : span.stop] = value
        frame = Frame(Kind.READY, ROUND, 0, place, place + 1, incarnation, slot, read=span.start, samples=span.stop)
        self.host.ready(frame)

    def push(self, incarnation: int, place: int, value: float, slot: int = 0) -> None:
        self.slots[incarnation][slot].fill_(value)
        frame = Frame(Kind.PUSH, ROUND, 0, place, place + 1, incarnation, slot, samples=1, weight=1.0)
        self.host.pushed(frame)

    def combine(self, *rows: tuple[int, int, int, int]) -> None:
        self.host.combine(ROUND, rows)


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def streaming(monkeypatch) -> Scripted:
    """Its vectors travel in four pieces, two to each slice."""
    monkeypatch.setattr("distrain.exchange.layout.PIECE_FLOATS", 32)
    script = Scripted(num_slices=2)
    assert [len(span) for span in script.spans] == [64, 48]
    script.ask(LEFT, 2)
    script.ask(RIGHT, 3)
    return script


def test_what_a_host_owes_nothing_more_of_is_sent_ahead_and_not_again(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.ask(RIGHT, 3)
    scripted.push(LEFT, 2, 1.0)
    assert scripted.sent == [], "the other one owes its part"
    scripted.push(RIGHT, 3, 10.0)
    [(first, stop, digest, values)] = scripted.sums
    rows = ((LEFT, 0, 2, 3), (RIGHT, 0, 3, 4))
    assert (first, stop, digest) == (2, 4, rows_digest(rows)) and (values == 11.0).all()
    scripted.combine(*rows)
    assert len(scripted.sums) == 1


def test_where_less_counts_it_is_summed_again_from_pushes_that_are_as_they_were(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.ask(RIGHT, 3)
    scripted.push(LEFT, 2, 1.0)
    scripted.push(RIGHT, 3, 10.0)
    row = (LEFT, 0, 2, 3)
    scripted.combine(row)
    first, stop, digest, values = scripted.sums[-1]
    assert (first, stop, digest) == (2, 3, rows_digest([row])) and (values == 1.0).all()
    scripted.combine((RIGHT, 0, 3, 4))
    assert scripted.sums[-1][:2] == (3, 4) and (scripted.sums[-1][3] == 10.0).all()


def test_what_counts_may_have_been_sent_ahead_in_parts(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.push(LEFT, 2, 1.0)
    scripted.ask(RIGHT, 3)
    scripted.push(RIGHT, 3, 10.0)
    assert [sent[:2] for sent in scripted.sums] == [(2, 3), (3, 4)]
    scripted.combine((LEFT, 0, 2, 3), (RIGHT, 0, 3, 4))
    assert len(scripted.sums) == 2


def test_where_two_push_the_same_place_the_server_says_which_counts(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.ask(RIGHT, 2)
    scripted.push(RIGHT, 2, 1.0)
    scripted.push(LEFT, 2, 1.0)
    assert scripted.sums == []
    scripted.combine((RIGHT, 0, 2, 3))
    assert [sent[:2] for sent in scripted.sums] == [(2, 3)]


def test_memory_of_sums_is_free_with_the_slots_that_they_were_made_of(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.ask(RIGHT, 3)
    scripted.push(LEFT, 2, 1.0)
    scripted.push(RIGHT, 3, 10.0)
    [memory] = scripted.host._work[ROUND].memory
    scripted.ask(LEFT, 2, ROUND + 1)
    assert scripted.host._work[ROUND].memory == []
    assert any(scripted.wire.pool.take(LAYOUT.vector_bytes) is memory for _ in range(2))


def test_pieces_go_out_as_soon_as_all_have_them(streaming: Scripted):
    streaming.ready(LEFT, 2, 1.0, Span(0, 40))
    assert streaming.sent == [], "nothing of the other's is there"
    streaming.ready(RIGHT, 3, 10.0, Span(0, 31))
    assert streaming.sent == [(0, Kind.OPEN)], "no piece of it is whole"
    streaming.ready(RIGHT, 3, 10.0, Span(31, 96))
    assert streaming.sent == [(0, Kind.OPEN), (0, Kind.PIECE)], "the first, and the left one has no other"
    assert streaming.kept == [Kind.OPEN]
    streaming.push(LEFT, 2, 1.0)
    assert streaming.sent[1:] == [(0, Kind.PIECE)] * 2 and streaming.kept[1:] == [Kind.PIECE], "of its own slice"
    streaming.push(RIGHT, 3, 10.0)
    assert streaming.sent[3:] == [(0, Kind.SUM)] and streaming.kept[2:] == [Kind.PIECE, Kind.SUM]
    [(first, stop, digest, values)] = streaming.sums
    rows = ((LEFT, 0, 2, 3), (RIGHT, 0, 3, 4))
    assert (first, stop, digest) == (2, 4, rows_digest(rows)) and (values == 11.0).all()
    streaming.combine(*rows)
    assert len(streaming.sums) == 1


@given(data=st.data())
def test_spans_may_come_in_any_order(data: st.DataObject):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.exchange.layout.PIECE_FLOATS", 32)
        script = Scripted(num_slices=2)
        script.ask(LEFT, 2)
        script.ask(RIGHT, 3)
        steps: list[tuple[int, int, float, Span]] = []
        for incarnation, place, value in ((LEFT, 2, 1.0), (RIGHT, 3, 10.0)):
            cuts = sorted({0, LAYOUT.num_floats, *data.draw(st.sets(st.integers(1, LAYOUT.num_floats - 1)))})
            spans = [Span(a, b) for a, b in itertools.pairwise(cuts)]
            steps += [(incarnation, place, value, span) for span in spans]
        for incarnation, place, value, span in data.draw(st.permutations(steps)):
            script.ready(incarnation, place, value, span)
        assert script.num_pieces == 2 and not script.sums
        script.push(RIGHT, 3, 10.0)
        script.push(LEFT, 2, 1.0)
        [(_, _, _, values)] = script.sums
        assert (values == 11.0).all() and script.num_pieces == 2 and not script.num_voided


def test_a_sum_of_what_will_not_come_is_void(streaming: Scripted):
    streaming.ready(LEFT, 2, 1.0, WHOLE)
    streaming.ready(RIGHT, 3, 10.0, Span(0, 32))
    assert streaming.num_pieces == 1
    streaming.host.left(RIGHT)
    assert streaming.num_voided == 1
    streaming.push(LEFT, 2, 1.0)
    [(first, stop, _, values)] = streaming.sums
    assert (first, stop) == (2, 3) and (values == 1.0).all()
    streaming.combine((LEFT, 0, 2, 3))
    assert len(streaming.sums) == 1


def test_a_sum_of_more_than_counts_is_void(streaming: Scripted):
    streaming.ready(LEFT, 2, 1.0, WHOLE)
    streaming.ready(RIGHT, 3, 10.0, Span(0, 32))
    streaming.push(LEFT, 2, 1.0)
    streaming.combine((LEFT, 0, 2, 3))
    assert streaming.num_voided == 1
    [(first, stop, _, values)] = streaming.sums
    assert (first, stop) == (2, 3) and (values == 1.0).all()


def test_what_was_pushed_elsewhere_than_said_is_sent_again(streaming: Scripted):
    streaming.ready(LEFT, 2, 1.0, WHOLE)
    streaming.ready(RIGHT, 3, 10.0, Span(0, 32))
    streaming.push(LEFT, 2, 1.0)
    streaming.push(RIGHT, 3, 20.0, slot=1)
    streaming.combine((LEFT, 0, 2, 3), (RIGHT, 1, 3, 4))
    assert streaming.num_voided == 1 and [(values == 21.0).all() for *_, values in streaming.sums] == [True]


def test_a_sum_of_a_round_that_is_over_is_void(streaming: Scripted):
    streaming.ready(LEFT, 2, 1.0, WHOLE)
    streaming.ready(RIGHT, 3, 10.0, Span(0, 32))
    streaming.ask(LEFT, 2, ROUND + 1)
    assert streaming.num_voided == 1 and streaming.sums == []


def test_what_a_helper_pushes_late_is_not_sent(streaming: Scripted):
    streaming.ask(LEFT, 3)  # in the other's stead
    streaming.push(LEFT, 2, 1.0)
    streaming.push(RIGHT, 3, 10.0)
    streaming.combine((LEFT, 0, 2, 3), (RIGHT, 0, 3, 4))
    sent = len(streaming.sent)
    streaming.ready(LEFT, 3, 10.0, Span(0, 32), slot=1)
    streaming.push(LEFT, 3, 10.0, slot=1)
    assert len(streaming.sent) == sent and len(streaming.sums) == 1


def test_what_a_worker_is_asked_for_again_is_not_summed_as_it_was(streaming: Scripted):
    """Since it is written anew, while the other one computes."""
    streaming.push(LEFT, 2, 1.0)
    streaming.ready(RIGHT, 3, 10.0, Span(0, 32))
    assert streaming.num_pieces == 1
    streaming.ask(LEFT, 2)
    assert streaming.num_voided == 1
    streaming.push(RIGHT, 3, 10.0)
    assert not streaming.sums
    again = streaming.slots[LEFT].renumbered(0)
    streaming.ready(LEFT, 2, 2.0, WHOLE, slot=again)
    streaming.push(LEFT, 2, 2.0, slot=again)
    [(first, stop, digest, values)] = streaming.sums
    rows = ((LEFT, again, 2, 3), (RIGHT, 0, 3, 4))
    assert (first, stop, digest) == (2, 4, rows_digest(rows)) and (values == 12.0).all()


def test_what_is_pushed_again_after_its_sum_was_sent_is_sent_again(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.push(LEFT, 2, 1.0)
    scripted.ask(LEFT, 2)
    again = scripted.slots[LEFT].renumbered(0)
    scripted.push(LEFT, 2, 2.0, slot=again)
    scripted.combine((LEFT, again, 2, 3))
    assert [sent[2] for sent in scripted.sums] == [rows_digest([(LEFT, slot, 2, 3)]) for slot in (0, again)]
    assert (scripted.sums[-1][3] == 2.0).all()


def test_what_comes_of_a_round_that_is_over_is_not_sent(streaming: Scripted):
    streaming.ask(LEFT, 2, ROUND + 1)
    streaming.ready(LEFT, 2, 1.0, WHOLE)
    streaming.ready(RIGHT, 3, 10.0, WHOLE)
    streaming.push(LEFT, 2, 1.0)
    streaming.push(RIGHT, 3, 10.0)
    assert streaming.sent == []
