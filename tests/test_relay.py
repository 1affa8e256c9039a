"""What a relay sends to the owner of the parameters, push by push. Whole runs with relays: server/test_hosts.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import nn

from distrain.exchange.link import Frame, Kind, pack_integers, pushes_digest
from distrain.exchange.memory import Layout, PushSlots
from distrain.relay import Relay, _Worker

LAYOUT = Layout.of(nn.Linear(3, 2))
SHARDS = 4
LEFT, RIGHT = 7, 8  # incarnations of the workers that compute shards 2 and 3
ROUND = 5


class Scripted:
    """A relay of two workers, without sockets. `sums` are those that it sent: (first, stop, digest, values)."""

    def __init__(self) -> None:
        self.relay = Relay(LAYOUT, SHARDS, "a test's token")
        self.relay._control = self.relay._owners[0] = self  # type: ignore[assignment]
        self.relay._num_sets, self.relay.number = 1, 1
        self.relay._hub.send = self._send  # type: ignore[method-assign]
        self.sums: list[tuple[int, int, int, np.ndarray]] = []
        self.workers = {}
        for incarnation in (LEFT, RIGHT):
            slots = PushSlots(LAYOUT, SHARDS, 1)
            self.workers[incarnation] = _Worker(incarnation, self, slots)  # type: ignore[arg-type]
            self.relay._workers[incarnation] = self.workers[incarnation]

    def _send(self, link: Any, frame: Frame) -> None:
        if frame.kind is Kind.SUM:
            self.sums.append((frame.first, frame.stop, frame.read, np.array(frame.payload)))

    def ask(self, incarnation: int, place: int, round_: int = ROUND) -> None:
        task = Frame(Kind.TRAIN, round_, first=place, stop=place + 1, incarnation=incarnation, samples=SHARDS)
        self.relay._from_server(task)

    def push(self, incarnation: int, place: int, value: float, slot: int = 0) -> None:
        worker = self.workers[incarnation]
        worker.slots[slot].fill_(value)
        frame = Frame(Kind.PUSH, ROUND, first=place, stop=place + 1, slot=slot, samples=1, weight=1.0)
        self.relay._from_worker(worker, frame)

    def combine(self, *rows: tuple[int, int, int, int]) -> None:
        self.relay._from_server(Frame(Kind.COMBINE, ROUND, samples=SHARDS, payload=pack_integers(rows)))


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    script = Scripted()
    yield script
    script.relay._hub.close()


def test_what_a_host_owes_nothing_more_of_is_sent_ahead_and_not_again(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.ask(RIGHT, 3)
    scripted.push(LEFT, 2, 1.0)
    assert scripted.sums == [], "the other one owes its part"
    scripted.push(RIGHT, 3, 10.0)
    [(first, stop, digest, values)] = scripted.sums
    rows = ((LEFT, 0, 2, 3), (RIGHT, 0, 3, 4))
    assert (first, stop, digest) == (2, 4, pushes_digest(rows)) and (values == 11.0).all()
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
    assert (first, stop, digest) == (2, 3, pushes_digest([row])) and (values == 1.0).all()
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


def test_memory_of_sums_sent_ahead_is_free_with_the_slots_that_they_were_made_of(scripted: Scripted):
    scripted.ask(LEFT, 2)
    scripted.ask(RIGHT, 3)
    scripted.push(LEFT, 2, 1.0)
    scripted.push(RIGHT, 3, 10.0)
    [memory] = scripted.relay._work[ROUND].memory
    scripted.ask(LEFT, 2, ROUND + 1)
    assert scripted.relay._work[ROUND].memory == []
    assert scripted.relay._wire.pool.take(LAYOUT.vector_bytes) is memory
