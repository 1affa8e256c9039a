"""Where a model's tensors lie in its flat vector: aligned, side by side in buckets, and spread over its depth."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distrain.exchange.layout import ALIGNMENT_BYTES, Layout, Span, overlaps, spread, views
from distrain.exchange.slices import cut


def layout_of(sizes: list[int], piece: int, norm: bool = False) -> Layout:
    """That of parameters of these sizes, with pieces of so many values."""
    model = nn.Module()
    model.weights = nn.ParameterList(torch.zeros(size) for size in sizes)
    if norm:
        model.norm = nn.BatchNorm1d(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.exchange.layout.PIECE_FLOATS", piece)
        return Layout.of(model)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(1, 400), st.booleans())
def test_every_tensor_starts_on_its_own_aligned_place(sizes: list[int], piece: int, norm: bool):
    layout = layout_of(sizes, piece, norm)
    parameters = sorted(layout.parameters, key=lambda entry: (entry.start, entry.numel))
    stop = 0
    for entry in [*parameters, *layout.float_buffers, *layout.int_buffers]:
        assert entry.start >= stop and entry.start * 4 % ALIGNMENT_BYTES == 0
        stop = entry.start + entry.numel
    assert stop <= layout.num_floats
    assert all(entry.start >= layout.num_gradients for entry in (*layout.float_buffers, *layout.int_buffers))
    assert [entry.numel for entry in layout.parameters][: len(sizes)] == sizes, "in the model's order"


@given(st.lists(st.integers(1, 200), min_size=1, max_size=12), st.integers(1, 400))
def test_buckets_hold_each_value_and_parameter_once(sizes: list[int], piece: int):
    layout = layout_of(sizes, piece)
    assert [index for bucket in layout.buckets for index in bucket.indices] == list(range(len(sizes)))
    spans = sorted((bucket.span for bucket in layout.buckets), key=lambda span: span.start)
    assert spans[0].start == 0 and spans[-1].stop == layout.num_gradients
    assert all(left.stop == right.start for left, right in pairwise(spans))
    assert all(len(bucket.span) >= piece for bucket in layout.buckets[1:])
    for bucket in layout.buckets:
        starts = [layout.parameters[index].start for index in bucket.indices]
        assert starts[0] == bucket.span.start and starts == sorted(starts) and starts[-1] < bucket.span.stop


@pytest.mark.parametrize("slices", [2, 3, 4])
@given(count=st.integers(8, 100), first=st.integers(0, 10**6))
def test_every_slice_has_parameters_of_every_depth(slices: int, count: int, first: int):
    """So that backward, wherever it is, has gradients for all of them before long."""
    layout = layout_of([64] * count, 64)
    owners: list[int] = []
    for entry in layout.parameters:
        [owner] = [number for number, span in enumerate(cut(layout, slices)) if span.start <= entry.start < span.stop]
        owners.append(owner)
    first %= count - 2 * slices + 1
    assert set(owners[first : first + 2 * slices]) == set(range(slices))


@given(st.lists(st.integers()))
def test_what_is_spread_is_all_there(items: list[int]):
    assert sorted(spread(items)) == sorted(items)


def test_a_small_model_lies_as_it_is():
    assert [entry.start for entry in layout_of([16, 1, 32], 10**6).parameters] == [0, 16, 32]
    assert spread("abcdefgh") == list("aecgbfdh")


def test_pieces_cover_a_span_from_the_left(monkeypatch):
    monkeypatch.setattr("distrain.exchange.layout.PIECE_FLOATS", 256)
    layout = layout_of([1000], 10**6)
    assert list(layout.pieces(Span(7, 600))) == [Span(7, 311), Span(311, 600)]
    assert list(layout.pieces(Span(0, 3 * 256 + 5))) == [Span(0, 272), Span(272, 544), Span(544, 773)]
    assert list(layout.pieces(Span(7, 7))) == []


@given(st.integers(0, 10**4), st.integers(0, 10**4))
def test_pieces_are_about_equal_and_cover_a_span(start: int, length: int):
    layout = layout_of([10**4], 10**6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.exchange.layout.PIECE_FLOATS", 300)
        pieces = list(layout.pieces(Span(start, start + length)))
    assert sum(map(len, pieces)) == length
    assert all(left.stop == right.start for left, right in pairwise(pieces))
    assert all(200 <= len(piece) < 470 for piece in pieces[:-1]) and all(len(piece) < 470 for piece in pieces)


def test_a_bias_does_not_wait_for_the_layer_before():
    layers = [nn.Linear(16, 16) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distrain.exchange.layout.PIECE_FLOATS", 256)
        layout = Layout.of(nn.Sequential(*layers))
    assert [list(bucket.indices) for bucket in layout.buckets] == [[0, 1], [2, 3], [4, 5]]


def test_pieces_of_smaller_models_are_smaller():
    def piece(num_floats: int) -> int:
        return len(next(layout_of([num_floats], 524_288).pieces(Span(0, 2**23))))

    assert [piece(10**n) for n in (4, 6, 7)] == [65_536, 65_536, 524_288]
    assert piece(4_000_000) == pytest.approx(250_000, rel=0.02)


@given(st.lists(st.integers(1, 200), min_size=4, max_size=12), st.integers(1, 400), st.integers(1, 4), st.booleans())
def test_a_slices_parts_are_of_one_bucket_each(sizes: list[int], piece: int, slices: int, norm: bool):
    layout = layout_of(sizes, piece, norm)
    parts = [part for span in cut(layout, slices) for part in layout.parts(span)]
    assert parts[0].start == 0 and parts[-1].stop == layout.num_floats
    assert all(left.stop == right.start and len(left) for left, right in pairwise(parts))
    buckets = [bucket.span for bucket in layout.buckets]
    for part in parts:
        holders = [span for span in buckets if span.start <= part.start and part.stop <= span.stop]
        assert len(holders) == (part.start < layout.num_gradients), "or it is of the buffers"


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(1, 400), st.integers(1, 4), st.booleans())
def test_each_slice_has_values_of_parameters(sizes: list[int], piece: int, slices: int, norm: bool):
    """Some models have parameters without any, such as nn.Linear(0, 5)."""
    layout = layout_of(sizes, piece, norm)
    count = sum(size > 0 for size in sizes) + 2 * norm
    if slices > max(1, count):
        with pytest.raises(ValueError, match=f"a model of {count} parameter tensors .*cannot be cut into {slices}"):
            cut(layout, slices)
        return
    spans = cut(layout, slices)
    assert len(spans) == slices and spans[0].start == 0 and spans[-1].stop == layout.num_floats
    assert all(left.stop == right.start for left, right in pairwise(spans))
    assert slices == 1 or all(any(s.start <= e.start < s.stop for e in layout.parameters if e.numel) for s in spans)


def test_a_layout_tells_models_apart():
    assert Layout.of(nn.Linear(2, 3)).digest == Layout.of(nn.Linear(2, 3)).digest
    assert Layout.of(nn.Linear(2, 3)).digest != Layout.of(nn.Linear(3, 2)).digest
    assert layout_of([64, 64, 64], 64).digest != layout_of([64, 64, 64], 10**6).digest, "it lies otherwise"


def test_views_have_the_tensors_shapes():
    layout = Layout.of(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)))
    vector = torch.zeros(layout.num_floats)
    assert [tuple(v.shape) for v in views(vector, layout.parameters)] == [(5, 3), (5,), (5,), (5,), (1, 5), (1,)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_overlaps_are_those_values_that_both_have(sizes: list[int], data: st.DataObject):
    ends = list(accumulate(sizes, initial=5))
    spans = [Span(start, stop) for start, stop in pairwise(ends)]
    start = data.draw(st.integers(ends[0], ends[-1] - 1))
    span = Span(start, data.draw(st.integers(start + 1, ends[-1])))
    shared = [len({*range(s.start, s.stop)} & {*range(span.start, span.stop)}) for s in spans]
    assert list(overlaps(spans, span)) == [(place, count) for place, count in enumerate(shared) if count]
