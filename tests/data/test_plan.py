"""Every row exactly once an epoch, in steps of exactly the batch size, whatever the numbers."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distrain.data.plan import Plan

counts = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)
plans = st.builds(
    Plan,
    row_counts=counts.map(tuple),
    batch_size=st.integers(1, 60),
    num_shards=st.integers(1, 7),
    shuffle_rows=st.integers(1, 50),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
)


def rows_of(plan: Plan, epoch: int, step: int, shard: int) -> list[tuple[int, int]]:
    """The rows of a microbatch as (row group, row), through slices and order."""
    rows = []
    for window, start, stop in plan.slices(epoch, step, shard):
        flat = [(piece.row_group, row) for piece in window.pieces for row in range(piece.start, piece.stop)]
        rows += [flat[index] for index in plan.order(epoch, shard, window)[start:stop]]
    return rows


def every_row(plan: Plan) -> list[tuple[int, int]]:
    return [(group, row) for group, rows in enumerate(plan.row_counts) for row in range(rows)]


@given(plan=plans, epoch=st.integers(0, 3))
def test_every_row_comes_exactly_once_an_epoch(plan: Plan, epoch: int):
    given = [
        row
        for step in range(plan.steps_per_epoch)
        for shard in range(plan.num_shards)
        for row in rows_of(plan, epoch, step, shard)
    ]
    assert Counter(given) == Counter(every_row(plan))


@given(plan=plans)
def test_steps_have_exactly_the_batch_size_and_are_dealt_evenly(plan: Plan):
    smallest = plan.num_rows
    for step in range(plan.steps_per_epoch):
        sizes = [stop - start for start, stop in (plan.cut(step, shard) for shard in range(plan.num_shards))]
        assert sum(sizes) == min(plan.batch_size, plan.num_rows - step * plan.batch_size)
        assert max(sizes) - min(sizes) <= 1
        smallest = min([smallest, *(size for size in sizes if size)])
    assert plan.smallest_forward == smallest


@given(plan=plans)
def test_shards_are_the_equal_spans_of_the_line(plan: Plan):
    n, s = plan.num_rows, plan.num_shards
    for shard in range(s):
        assert plan.shard_rows(shard) == (shard + 1) * n // s - shard * n // s
        cuts = [plan.cut(step, shard) for step in range(plan.steps_per_epoch)]
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])]
        assert cuts[-1][1] == plan.shard_rows(shard)
        assert sum(window.num_rows for window in plan.windows(0, shard)) == plan.shard_rows(shard)


@given(plan=plans)
def test_windows_are_bounded_and_large_row_groups_are_split(plan: Plan):
    for shard in range(plan.num_shards):
        for window in plan.windows(0, shard):
            assert window.num_rows < 3 * plan.shuffle_rows + 1


@given(plan=plans, data=st.data())
def test_any_microbatch_is_the_same_whatever_was_asked_before(plan: Plan, data: st.DataObject):
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    shard = data.draw(st.integers(0, plan.num_shards - 1))
    fresh = Plan(plan.row_counts, plan.batch_size, plan.num_shards, plan.shuffle_rows, plan.seed, plan.shuffle)
    rows_of(plan, 1, 0, 0)
    rows = rows_of(plan, 2, step, shard)
    assert rows == rows_of(fresh, 2, step, shard)
    for index, row in enumerate(rows):
        assert plan.row(2, step, shard, index) == row


def test_epochs_and_seeds_shuffle_differently_and_without_shuffling_the_order_is_the_files():
    def order(plan: Plan, epoch: int) -> list[tuple[int, int]]:
        return [row for step in range(plan.steps_per_epoch) for row in rows_of(plan, epoch, step, 0)]

    plan = Plan((50, 50, 50), 10, 1, 60)
    assert order(plan, 0) != order(plan, 1)
    assert order(plan, 0) != order(Plan((50, 50, 50), 10, 1, 60, seed=1), 0)
    assert order(Plan((50, 50, 50), 10, 1, 60, shuffle=False), 3) == every_row(plan)


def test_the_order_is_pinned_since_resumed_runs_depend_on_it():
    plan = Plan((4, 3, 5), batch_size=4, num_shards=2, shuffle_rows=5, seed=7)
    assert [rows_of(plan, 0, 0, shard) for shard in range(2)] == [[(2, 1), (0, 2)], [(2, 4), (1, 0)]]


def test_positions_count_steps_over_epochs():
    plan = Plan((10,), 4, 1)
    assert plan.steps_per_epoch == 3
    assert [plan.position(step) for step in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"num_shards": 0}, {"shuffle_rows": 0}, {"row_counts": (0, 0)}])
def test_impossible_plans_are_refused(wrong: dict):
    with pytest.raises(ValueError, match="at least"):
        Plan(**{"row_counts": (5,), "batch_size": 2, "num_shards": 1, **wrong})


def test_a_step_costs_the_same_with_many_row_groups():
    """Asking for a microbatch must not walk over all row groups again."""
    plan = Plan(tuple([10] * 200_000), 1000, 2)
    plan.slices(0, 0, 0)
    windows = plan.windows(0, 0)
    for step in random.Random(0).sample(range(plan.steps_per_epoch), 50):
        plan.slices(0, step, 0)
    assert plan.windows(0, 0) is windows


@given(plan=plans, forward_rows=st.integers(1, 50))
def test_pieces_make_up_the_microbatch_in_order_and_are_of_nearly_equal_size(plan: Plan, forward_rows: int):
    plan = replace(plan, forward_rows=forward_rows)
    smallest = plan.num_rows
    for step in range(plan.steps_per_epoch):
        for shard in range(plan.num_shards):
            count = plan.num_pieces(step, shard)
            pieces = [plan.piece(step, shard, number) for number in range(count)]
            sizes = [stop - start for start, stop in pieces]
            assert max(sizes) <= forward_rows and max(sizes) - min(sizes) <= 1
            smallest = min([smallest, *(size for size in sizes if size)])
            whole = plan.slices(1, step, shard)
            parts = [part for number in range(count) for part in plan.slices(1, step, shard, number)]

            def rows(slices) -> list[tuple[int, int]]:
                return [(window.index, at) for window, start, stop in slices for at in range(start, stop)]

            assert rows(parts) == rows(whole)
    assert plan.smallest_forward == smallest
