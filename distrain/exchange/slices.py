"""Slices: the spans of a model's flat vector that several parameter servers share among them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from distrain.exchange.layout import Layout, Span


def extents(layout: Layout) -> list[int]:
    """How many values each parameter takes, its padding included, from the vector's left."""
    starts = [*sorted(entry.start for entry in layout.parameters), layout.num_gradients]
    return [stop - start for start, stop in pairwise(starts)]


def cut(layout: Layout, num_slices: int) -> tuple[Span, ...]:
    """Cut the vector into so many spans of whole tensors, so that the largest is as small as it can be.

    The model's buffers follow its parameters, so they belong to the last slice. Raises ValueError where the model has
    fewer parameter tensors with values in them than there are to be slices.
    """
    sizes = [size for size in extents(layout) if size]
    if num_slices > max(1, len(sizes)):
        without = len(layout.parameters) - len(sizes)
        others = f" (and {without} without values)" if without else ""
        raise ValueError(f"a model of {len(sizes)} parameter tensors{others} cannot be cut into {num_slices} slices")
    if num_slices == 1:
        return (layout.whole,)
    sizes[-1] += layout.num_floats - layout.num_gradients
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if max(_fill(sizes, num_slices, middle)) <= middle:
            high = middle
        else:
            low = middle + 1
    spans: list[Span] = []
    for size in _fill(sizes, num_slices, low):
        start = spans[-1].stop if spans else 0
        spans.append(Span(start, start + size))
    return tuple(spans)


def _fill(sizes: Sequence[int], num_slices: int, most: int) -> list[int]:
    """The sizes of slices filled from the left up to `most` each, every one with a tensor at least, of which none is
    empty; the last one takes what is left."""
    filled = [0]
    for place, size in enumerate(sizes):
        is_full = filled[-1] and filled[-1] + size > most
        must_end = filled[-1] and len(sizes) - place == num_slices - len(filled)
        if len(filled) < num_slices and (is_full or must_end):
            filled.append(0)
        filled[-1] += size
    return filled
