"""The tree sum is the same to the bit, whoever adds what and in whatever order it arrives."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distrain.reduction import Block, Partial, TreeSum


def leaves(num_shards: int, seed: int) -> list[Partial]:
    values = np.random.default_rng(seed).normal(size=(num_shards, 5)).astype(np.float32) * 1e3
    return [Partial(values[i].copy(), i + 1, float(values[i].sum()), i + 1.0, i) for i in range(num_shards)]


def recursive_sum(values: np.ndarray, first: int, width: int) -> np.ndarray:
    """The definition: a node of width w is its left half plus its right half."""
    if width == 1:
        return values[first]
    half = width // 2
    left = recursive_sum(values, first, half)
    return left + recursive_sum(values, first + half, half) if first + half < len(values) else left


@given(num_shards=st.integers(1, 40), seed=st.integers(0, 9), data=st.data())
def test_any_split_over_workers_and_any_order_gives_the_same_bits(num_shards: int, seed: int, data: st.DataObject):
    cuts = sorted(data.draw(st.sets(st.integers(1, num_shards), max_size=5)) | {num_shards})
    pushed: list[tuple[Block, Partial]] = []
    first = 0
    parts = leaves(num_shards, seed)
    for stop in cuts:
        worker = TreeSum(num_shards)
        for shard in range(first, stop):
            worker.put(Block(shard, shard + 1), parts[shard])
            while worker.late:
                worker.work(4)
        pushed += list(worker)
        first = stop
    server = TreeSum(num_shards)
    for block, part in data.draw(st.permutations(pushed)):
        server.put(block, part)
    total, *right = server.fold()
    assert len(right) <= 1
    for part in right:
        total.add(part)
    values = np.stack([leaf.vector for leaf in leaves(num_shards, seed)])
    width = 1 << (num_shards - 1).bit_length()
    np.testing.assert_array_equal(total.vector, recursive_sum(values, 0, width))
    assert total.samples == num_shards * (num_shards + 1) // 2


@given(num_shards=st.integers(1, 40), data=st.data())
def test_what_is_added_up_in_between_and_late_has_the_same_bits(num_shards: int, data: st.DataObject):
    at_once, in_blocks = TreeSum(num_shards), TreeSum(num_shards)
    for shard in data.draw(st.permutations(range(num_shards))):
        at_once.put(Block(shard, shard + 1), leaves(num_shards, 0)[shard])
        in_blocks.put(Block(shard, shard + 1), leaves(num_shards, 0)[shard])
        for num_values in data.draw(st.lists(st.integers(1, 6), max_size=3)):
            if in_blocks.late:
                in_blocks.work(num_values)
    halves = in_blocks.halves()
    for stop in (2, 3, 5):
        for merge in in_blocks.late:
            merge.add_until(stop)
    for part, expected in zip(halves, at_once.fold(), strict=True):
        np.testing.assert_array_equal(part.vector, expected.vector)
        assert part.samples == expected.samples


@given(num_shards=st.integers(1, 40), data=st.data())
def test_what_came_is_added_up_where_some_is_missing(num_shards: int, data: st.DataObject):
    came = data.draw(st.sets(st.integers(0, num_shards - 1), min_size=1))
    tree = TreeSum(num_shards)
    for shard in data.draw(st.permutations(sorted(came))):
        tree.put(Block(shard, shard + 1), leaves(num_shards, 0)[shard])
    parts = tree.fold()
    assert len(parts) <= 2 and sum(part.samples for part in parts) == sum(shard + 1 for shard in came)
    expected = sum(leaves(num_shards, 0)[shard].vector.astype(np.float64) for shard in came)
    np.testing.assert_allclose(sum(part.vector for part in parts), expected, rtol=1e-3, atol=1e-2)


@given(num_shards=st.integers(1, 40), data=st.data())
def test_fresh_vectors_leave_what_was_put_as_it_was(num_shards: int, data: st.DataObject):
    put, kept = leaves(num_shards, 0), leaves(num_shards, 0)
    plain, careful = TreeSum(num_shards), TreeSum(num_shards, fresh=lambda: np.empty(5, np.float32))
    for shard in data.draw(st.permutations(range(num_shards))):
        careful.put(Block(shard, shard + 1), put[shard])
        while careful.late:
            careful.work(5)
    for was, leaf in zip(kept, put, strict=True):
        np.testing.assert_array_equal(was.vector, leaf.vector)
        assert (was.samples, was.loss) == (leaf.samples, leaf.loss)
    for shard in range(num_shards):
        plain.put(Block(shard, shard + 1), kept[shard])
        while plain.late:
            plain.work(3)
    for (block, part), (expected_block, expected) in zip(careful, plain, strict=True):
        assert block == expected_block and part.samples == expected.samples
        np.testing.assert_array_equal(part.vector, expected.vector)


@given(num_shards=st.integers(1, 40), data=st.data())
def test_freed_parts_are_each_part_but_those_left(num_shards: int, data: st.DataObject):
    tree = TreeSum(num_shards)
    freed: list[int] = []
    for shard in data.draw(st.permutations(range(num_shards))):
        merges = tree.plan(Block(shard, shard + 1), leaves(num_shards, 0)[shard])
        freed += [merge.right.slot for merge in merges]
    assert sorted([*freed, *(part.slot for _, part in tree)]) == list(range(num_shards))


def test_blocks_that_are_not_halves_of_one_node_do_not_join():
    assert Block(0, 1).joins(Block(1, 2), 4)
    assert not Block(1, 2).joins(Block(2, 3), 4)
    assert not Block(0, 2).joins(Block(2, 3), 4)
    assert Block(0, 2).joins(Block(2, 3), 3)
