"""Shares of the work by speed."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.server.dealing import better_shares, even_shares, fastest_shares, seconds_needed


@given(st.integers(1, 8), st.lists(st.floats(0.1, 100), min_size=1, max_size=3))
def test_no_other_shares_are_done_sooner(count: int, speeds: list[float]):
    best = fastest_shares(count, speeds)
    assert sum(best) == count
    others = [s for s in itertools.product(range(count + 1), repeat=len(speeds)) if sum(s) == count]
    assert seconds_needed(best, speeds) <= min(seconds_needed(s, speeds) for s in others) * (1 + 1e-12)


@given(st.integers(0, 50), st.integers(1, 9))
def test_even_shares_differ_by_at_most_one(count: int, num_workers: int):
    shares = even_shares(count, num_workers)
    assert sum(shares) == count and max(shares) - min(shares) <= 1


def test_equal_workers_keep_what_they_have():
    assert better_shares([4, 4], [10.0, 10.0]) is None
    assert better_shares([4, 4], [10.0, 8.5]) is None


def test_a_worker_slowed_fourfold_gets_a_quarter():
    assert better_shares([5, 5], [4.0, 1.0]) == [8, 2]
    assert seconds_needed([8, 2], [4.0, 1.0]) == pytest.approx(2.0)
