"""Workers that sleep on cores of their own, and are bound to none."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from distrain.exchange.cores import Cores

CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture
def cores() -> Iterator[Cores]:
    made = Cores()
    yield made
    made.buffer.close()


def in_a_thread(work: Callable[[], int]) -> int:
    """Its result. What it does to its own affinity ends with the thread."""
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join(10)
    return results[0]


def settled(cores: Cores, rank: int, core: int, allowed: list[int]) -> int:
    """Where a worker settles that comes from this core and may run on those."""

    def work() -> int:
        os.sched_setaffinity(0, [core])
        os.sched_setaffinity(0, allowed)
        found = cores.settle(rank)
        assert os.sched_getaffinity(0) == set(allowed)
        return found

    return in_a_thread(work)


@pytest.mark.skipif(len(CORES) < 2, reason="one core")
def test_who_comes_second_sleeps_elsewhere(cores: Cores):
    first = settled(cores, 0, CORES[0], CORES[:1])
    assert first == CORES[0]
    again = Cores(os.dup(cores.buffer.fd))  # as another process has it
    second = settled(again, 1, CORES[0], CORES)
    assert second != first
    again.buffer.close()


def test_nobody_is_sent_away_where_there_is_no_other_core(cores: Cores):
    assert [settled(cores, rank, CORES[0], CORES[:1]) for rank in range(3)] == [CORES[0]] * 3


def test_who_is_awake_is_in_nobody_s_way(cores: Cores):
    core = settled(cores, 0, CORES[0], CORES[:1])
    cores.leave(core, 0)
    assert cores.buffer.words(core + 1)[core] == 0
    assert settled(cores, 1, core, [core]) == core
    cores.leave(core, 0)  # too late: another one sleeps there
    assert cores.buffer.words(core + 1)[core] == 2


def test_who_was_killed_in_its_sleep_gives_way_to_its_replacement(cores: Cores):
    settled(cores, 4, CORES[0], CORES[:1])
    assert settled(cores, 4, CORES[0], CORES[:1]) == CORES[0]
