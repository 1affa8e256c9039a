"""Rounding to bfloat16: to one of the two neighbours, without loss over the steps, by step and node alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distrain.exchange.rounding import Dither
from distrain.learning.clipping import PIECE
from distrain.reduction import Block, Partial, TreeSum

LEAF = Block(0, 1)
finite = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
blocks = st.builds(lambda first, width: Block(first, first + width), st.integers(0, 500), st.integers(1, 64))


def rounded(values, step: int = 0, block: Block = LEAF, start: int = 0) -> torch.Tensor:
    """A rounded copy."""
    copy = torch.as_tensor(values, dtype=torch.float32).clone()
    Dither().round_(copy, step, block, start)
    return copy


def neighbours(value: float) -> tuple[float, float]:
    """The values of bfloat16 next to a float32, towards 0 and away from it."""
    down = np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)
    up = down if down == np.float32(value).view(np.uint32) else down + np.uint32(0x10000)
    return float(down.view(np.float32)), float(up.view(np.float32))


@given(st.lists(finite, min_size=1, max_size=50), st.integers(0, 2**40), blocks)
def test_a_value_becomes_one_of_its_neighbours_and_then_stays(values: list[float], step: int, block: Block):
    once = rounded(values, step, block)
    assert all(got in neighbours(value) for got, value in zip(once.tolist(), values, strict=True))
    assert torch.equal(once.to(torch.bfloat16).to(torch.float32), once)
    assert torch.equal(rounded(once, step + 1, block), once)


@settings(deadline=None)
@given(finite, st.integers(0, 10**6), st.integers(1, 200), blocks, st.integers(0, 10**6))
def test_what_was_sent_is_what_was_meant_within_a_few_roundings(value, step, count, block, start):
    sent = math.fsum(rounded([value], each, block, start).item() for each in range(step, step + count))
    down, up = neighbours(np.float32(value))
    unit = abs(up - down)
    meant = count * float(np.float32(value))
    assert abs(sent - meant) <= (math.log2(count) + 2) * unit + 1e-9 * abs(meant)


def test_the_nearest_value_would_lose_more():
    value, count = 1.0 + 0.4 * 2**-7, 500
    nearest = count * torch.tensor(value).to(torch.bfloat16).item()
    assert abs(nearest - count * value) > 10 * (math.log2(count) + 2) * 2**-7


@pytest.mark.parametrize("step", [0, 12 * 2**10, 2**30])
def test_nothing_is_lost_over_all_thresholds(step: int):
    # Of 2^10 steps in a row, one threshold lies in each 2^10th part of the range, so multiples of that lose nothing.
    bits = torch.tensor(1.5).view(torch.int32) + 64 * torch.randint(0, 2**10, (100,), dtype=torch.int32)
    dither, total = Dither(), torch.zeros(100, dtype=torch.float64)
    for each in range(step, step + 2**10):
        values = bits.clone().view(torch.float32)
        dither.round_(values, each, Block(5, 7))
        total += values
    assert torch.equal(total, 2**10 * bits.view(torch.float32).double())


def test_shards_with_the_same_gradient_are_rounded_apart():
    value = 1.0 + 0.3 * 2**-7
    ups = sum(rounded([value], 5, Block(shard, shard + 1)).item() > value for shard in range(1000))
    assert abs(ups - 300) < 5
    ups = (rounded(torch.full((PIECE,), value)) > value).sum().item()
    assert abs(ups / PIECE - 0.3) < 0.001


@settings(deadline=None)
@given(st.integers(0, 3 * PIECE), st.integers(0, 3 * PIECE), st.integers(0, 2**20))
def test_a_span_is_rounded_as_in_the_whole(first: int, second: int, step: int):
    start, stop = sorted((first, second))
    whole = torch.randn(3 * PIECE, generator=torch.Generator().manual_seed(step))
    block = Block(2, 4)
    assert torch.equal(rounded(whole[start:stop], step, block, start), rounded(whole, step, block)[start:stop])


def test_what_is_not_finite_stays_so_and_spares_its_neighbours():
    values = torch.tensor([1.1, math.nan, math.inf, -math.inf, -2.3, 3.4e38, 1e25])
    values[1:2].view(torch.int32).fill_(0x7FFFFFFF)  # the NaN of NVIDIA's GPUs
    got = rounded(values)
    assert math.isnan(got[1]) and got[2] == math.inf and got[3] == -math.inf
    alone = [rounded(values[i : i + 1], start=i).item() for i in (0, 4, 6)]
    assert got[[0, 4, 6]].tolist() == alone
    assert not math.isfinite(got[5]) or got[5] in neighbours(np.float32(3.4e38))


@settings(deadline=None)
@given(num_shards=st.integers(1, 33), step=st.integers(0, 2**17), data=st.data())
def test_rounded_sums_do_not_depend_on_who_added_what(num_shards: int, step: int, data: st.DataObject):
    dither = Dither()

    def finish(block: Block, values: torch.Tensor, start: int) -> None:
        dither.round_(values, step, block, start)

    def leaf(shard: int) -> Partial:
        generator = torch.Generator().manual_seed(shard)
        part = Partial(torch.randn(20, generator=generator), 1, 0.0, 1.0)
        finish(Block(shard, shard + 1), part.vector, 0)
        return part

    def add_up(blocks) -> list[tuple[Block, Partial]]:
        tree = TreeSum(num_shards, finish)
        for block, part in blocks:
            tree.put(block, part)
            while tree.late:
                tree.work(7)
        return list(tree)

    expected = add_up((Block(shard, shard + 1), leaf(shard)) for shard in range(num_shards))
    stops = sorted(data.draw(st.sets(st.integers(1, num_shards), max_size=6)) | {num_shards})
    sums: list[tuple[Block, Partial]] = []
    for first, stop in zip([0, *stops], stops, strict=False):
        sums += add_up((Block(shard, shard + 1), leaf(shard)) for shard in range(first, stop))
    for _, part in sums:  # nothing is lost where they cross a wire
        assert torch.equal(part.vector.to(torch.bfloat16).to(torch.float32), part.vector)
    got = add_up(data.draw(st.permutations(sums)))
    assert [block for block, _ in got] == [block for block, _ in expected]
    assert all(torch.equal(a.vector, b.vector) for (_, a), (_, b) in zip(got, expected, strict=True))
    exact = torch.stack([leaf(shard).vector for shard in range(num_shards)]).sum(0)
    close = sum(part.vector for _, part in got)
    assert (close - exact).abs().max() <= 2**-7 * (1 + num_shards.bit_length()) * 3 * num_shards**0.5 * 2
