"""Every microbatch of every epoch is applied exactly once, in whatever order updates come and wherever a run stops."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.server.agenda import Agenda, FreeAgenda, Microbatch, StepAgenda

LENGTH, SHARDS, EPOCHS = 4, 3, 2
ALL = {(step, shard) for step in range(LENGTH * EPOCHS) for shard in range(SHARDS)}


def rows(step_in_epoch: int, shard: int) -> int:
    """The last step of an epoch is partial: its third microbatch is empty."""
    return 0 if (step_in_epoch, shard) == (LENGTH - 1, SHARDS - 1) else 5


WITH_ROWS = {(step, shard) for step, shard in ALL if rows(step % LENGTH, shard)}


def steps(may_drop: bool = False) -> Agenda:
    return StepAgenda(LENGTH, SHARDS, EPOCHS, may_drop, rows)


def free(staleness: int | None = 1) -> Agenda:
    return FreeAgenda(LENGTH, SHARDS, EPOCHS, staleness, rows)


def test_steps_come_in_order_one_of_each_shard():
    agenda = steps()
    dealt = [agenda.next() for _ in range(LENGTH * EPOCHS)]
    assert dealt == [tuple((step, shard) for shard in range(SHARDS)) for step in range(LENGTH * EPOCHS)]
    assert agenda.next() == ()
    assert [agenda.applied(microbatches) for microbatches in dealt] == [False, False, False, True] * EPOCHS
    assert agenda.finished


def run(agenda: Agenda, make: object, seed: int, flight_size: int, drop: bool, restart: bool) -> Counter[Microbatch]:
    """Deal and apply at random, with restarts from the state; what was applied, how often."""
    rng = random.Random(seed)
    applied: Counter[Microbatch] = Counter()
    flight: list[tuple[Microbatch, ...]] = []
    while not agenda.finished:
        while len(flight) < flight_size and (microbatches := agenda.next([rng.randrange(SHARDS)])):
            flight.append(microbatches)
        assert flight, "nothing can be dealt and nothing is in flight"
        took = flight.pop(0 if drop or make is steps else rng.randrange(len(flight)))
        dropped = [m for m in took[1:] if drop and rng.random() < 0.4]
        epoch = agenda.epoch
        assert all(step // LENGTH == epoch for step, _ in took)
        ended = agenda.applied([m for m in took if m not in dropped], dropped)
        applied.update(m for m in took if m not in dropped)
        assert ended == (agenda.epoch == epoch + 1)
        if restart and rng.random() < 0.3:
            state, flight = agenda.state_dict(), []
            agenda = make() if make is not None else agenda  # type: ignore[operator]
            agenda.load_state_dict(state)
    return applied


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
def test_steps_with_dropped_microbatches(seed: int, flight_size: int, restart: bool):
    def make() -> Agenda:
        return steps(may_drop=True)

    assert run(make(), make, seed, flight_size, True, restart) == Counter(WITH_ROWS)


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
def test_whole_steps(seed: int, flight_size: int, restart: bool):
    assert run(steps(), steps, seed, flight_size, False, restart) == Counter(ALL)


@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans(), st.sampled_from([0, 1, 3, None]))
def test_microbatches_one_by_one(seed: int, flight_size: int, restart: bool, staleness: int | None):
    def make() -> Agenda:
        return free(staleness)

    assert run(make(), make, seed, flight_size, False, restart) == Counter(WITH_ROWS)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_shard_runs_ahead_by_more_than_the_staleness(staleness: int):
    agenda = free(staleness)
    ahead = [agenda.next([0])[0] for _ in range(staleness + 1)]
    assert ahead == [(step, 0) for step in range(staleness + 1)], "its own shard first"
    for microbatch in ahead:
        agenda.applied([microbatch])
    others = []
    while microbatch := agenda.next([0]):
        others += microbatch
    assert others == [(step, shard) for step in range(staleness + 1) for shard in (1, 2)]
    agenda.applied([(0, 1)])
    assert agenda.next([0]) == ()
    agenda.applied([(0, 2)])
    assert agenda.next([0]) == ((staleness + 1, 0),)


def test_without_a_bound_a_shard_may_be_done_while_others_have_not_begun():
    agenda = free(None)
    assert [agenda.next([1]) for _ in range(LENGTH)] == [((step, 1),) for step in range(LENGTH)]
    assert agenda.next([1])[0][1] != 1
