"""Vectors on the wire: what is sent arrives, in half the bytes as bfloat16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distrain.exchange.layout import Layout, Span
from distrain.exchange.memory import Published
from distrain.exchange.slices import cut
from distrain.exchange.wire import WIRES, RoundedWire, Wire
from distrain.reduction import Block


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 7))


LAYOUT = Layout.of(model())


def summed(wire: Wire) -> torch.Tensor:
    """A sum over shards as a host has it, with changes of buffers that bfloat16 could not hold."""
    vector = torch.randn(LAYOUT.num_floats, generator=torch.Generator().manual_seed(1))
    vector[LAYOUT.num_gradients :] = 257.0 + torch.arange(LAYOUT.num_floats - LAYOUT.num_gradients)
    if (finish := wire.rounding(3)) is not None:
        finish(Block(0, 1), vector, 0)
    return vector


def in_pieces(span: Span) -> Iterator[Span]:
    """Some of gradients, some of buffers, and some of both."""
    for start in range(span.start, span.stop, 48):
        yield Span(start, min(start + 48, span.stop))


def sum_bytes(wire: Wire, span: Span) -> int:
    return len(wire.sum_place(memoryview(bytearray(4 * len(span))), span, span))


@pytest.mark.parametrize("dtype", WIRES)
@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_sums_arrive_as_they_were(dtype: str, num_slices: int):
    sender, receiver = WIRES[dtype](LAYOUT), WIRES[dtype](LAYOUT)
    vector = summed(sender)
    for span in cut(LAYOUT, num_slices):
        memory = receiver.pool.take(4 * len(span))
        for _ in range(2):  # in memory that is used again
            memory[:] = bytes(len(memory))
            for piece in in_pieces(span):
                packed = sender.pack_sum(vector, piece)
                payload = memoryview(packed).cast("B")
                place = receiver.sum_place(memory, span, piece)
                assert len(payload) == len(place)
                place[:] = payload
                receiver.unpack_sum(place, memory, span, piece)
                sender.sent(packed)
            assert torch.equal(torch.frombuffer(memory, dtype=torch.float32), vector[span.start : span.stop])


@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_bfloat16_takes_half_the_bytes_of_gradients_and_parameters(num_slices: int):
    whole, half = Wire(LAYOUT), RoundedWire(LAYOUT)
    published = Published(LAYOUT)
    for span in cut(LAYOUT, num_slices):
        saved = 2 * (min(span.stop, LAYOUT.num_gradients) - span.start)
        assert sum_bytes(whole, span) - sum_bytes(half, span) == saved > 0
        assert len(whole.parameters(published, span)) - len(half.parameters(published, span)) == saved


@pytest.mark.parametrize("dtype", WIRES)
@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_workers_of_every_host_read_the_same_parameters(dtype: str, num_slices: int):
    ours, theirs = WIRES[dtype](LAYOUT), WIRES[dtype](LAYOUT)
    published, other = Published(LAYOUT), Published(LAYOUT)
    master = torch.randn(LAYOUT.num_floats, generator=torch.Generator().manual_seed(2))
    published.floats.copy_(master)
    published.ints.fill_(2**40 + 1)
    for piece in [piece for span in cut(LAYOUT, num_slices) for piece in in_pieces(span)]:
        ours.round_parameters(published, piece)
        theirs.parameters(other, piece)[:] = ours.parameters(published, piece)
        theirs.unpack_parameters(other, piece)
    assert torch.equal(other.floats, published.floats) and torch.equal(other.ints, published.ints)
    gradients = slice(0, LAYOUT.num_gradients)
    expected = master[gradients].to(torch.bfloat16).float() if dtype == "bf16" else master[gradients]
    assert torch.equal(other.floats[gradients], expected)
    assert torch.equal(other.floats[LAYOUT.num_gradients :], master[LAYOUT.num_gradients :])


@given(st.lists(st.floats(-(2.0**-9), 2.0**-9, width=32), min_size=1, max_size=60))
def test_the_sum_of_updates_sent_is_that_of_updates_meant_within_one_rounding(updates: list[float]):
    wire, published = RoundedWire(LAYOUT), Published(LAYOUT)
    master, sent, before = torch.ones(1), 0.0, None
    for update in updates:
        master += update
        published.floats[:1] = master
        wire.round_parameters(published, Span(0, 16))
        now = published.floats[0].item()
        sent += now - (1.0 if before is None else before)
        before = now
    assert abs(sent - (master.item() - 1.0)) <= 2**-8


def test_memory_is_used_again_once_it_is_sent():
    wire = RoundedWire(LAYOUT)
    vector, span = summed(wire), Span(0, LAYOUT.num_floats)
    first, second = wire.pack_sum(vector, span), wire.pack_sum(vector, span)
    assert first is not second
    wire.sent(first)
    assert wire.pack_sum(vector, span) is first
