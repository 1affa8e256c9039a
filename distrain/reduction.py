"""Fixed-order tree sums over shards, used by worker and server.

Floating-point addition is not associative, so a sum is only the same to the bit when its order is. The order here is
an aligned binary tree over the shards 0..S-1: the node of width w (a power of two) at index i sums the shards
[i*w, min((i+1)*w, S)), always as left half + right half. A worker that holds both halves of a node may add them
itself; the result does not depend on who added, nor on when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K")

_NO_SLOT = -1


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """The shards [first, stop): a node of the tree."""

    first: int
    stop: int

    def joins(self, right: Block, num_shards: int) -> bool:
        """Whether this block and `right` are the two halves of one node."""
        width = self.stop - self.first
        return (
            self.stop == right.first
            and width & (width - 1) == 0
            and self.first % (2 * width) == 0
            and right.stop == min(right.first + width, num_shards)
        )


@dataclass(slots=True)
class Partial:
    """What a block of shards gives to a step: sums, never means, so that blocks of any size add up right.

    `vector` (a tensor or array) is, for a training step, float32 [layout.num_floats]: the gradient of the summed loss,
    then the buffers' changes times the samples. For a validation step it is float64: the metrics' sums. `slot` says
    where in a push buffer the vector lies. `loss` and the gradient are weighted sums, and `weight` is the sum of the
    rows' weights: the number of samples where all count the same. `squares` adds up the squared norms of the
    microbatches' own gradients, of the summed loss, in the steps that take them.
    """

    vector: Any
    samples: int
    loss: float
    weight: float
    slot: int = 0
    squares: float = 0.0

    def add(self, right: Partial) -> None:
        """Add the sibling block to the right, in place."""
        self.vector += right.vector
        self.samples += right.samples
        self.loss += right.loss
        self.weight += right.weight
        self.squares += right.squares


Finish = Callable[[Block, Any, int], None]
"""What is done, in place, to values of a node that were just added up: those of its vector from this place on."""


@dataclass(slots=True)
class Merge:
    """Two halves that make a node. Its vector is that of the left half, or one of its own. What is added up of the
    vectors, and when, is up to the caller."""

    block: Block
    left: Partial
    right: Partial
    total: Partial
    finish: Finish | None
    done: int = 0  # values that `add_until` has added up

    def add(self, values: slice) -> None:
        """Add up these values of the vectors."""
        into = self.total.vector[values]
        if self.total is not self.left:
            into[:] = self.left.vector[values]
        into += self.right.vector[values]
        if self.finish is not None:
            self.finish(self.block, into, values.start)

    def add_until(self, stop: int) -> None:
        """Add up the values before this place that were not yet."""
        if stop > self.done:
            self.add(slice(self.done, stop))
            self.done = stop

    def add_numbers(self) -> None:
        """Add up everything but the vectors."""
        total, left, right = self.total, self.left, self.right
        total.samples = left.samples + right.samples
        total.loss = left.loss + right.loss
        total.weight = left.weight + right.weight
        total.squares = left.squares + right.squares


@dataclass(eq=False, slots=True)
class Planned(Generic[K]):
    """Sums that were planned before what they are of is there. `nodes` are those that do not merge further, in shard
    order."""

    parts: dict[K, Partial]
    merges: list[Merge]
    nodes: list[tuple[Block, Partial]]

    def add(self, values: slice) -> None:
        """Add up these values, which all parts have."""
        for merge in self.merges:
            merge.add(values)

    def add_numbers(self, said: Mapping[K, Partial]) -> None:
        """Add up everything but the vectors, once that is known of all parts."""
        for key, part in self.parts.items():
            known = said[key]
            part.samples, part.loss, part.weight, part.squares = known.samples, known.loss, known.weight, known.squares
        for merge in self.merges:
            merge.add_numbers()


class TreeSum:
    """Sums the parts of a step in the fixed order, as far as what has been put allows. `finish` is done to each sum of
    two halves but the root's. What is put is added to, unless `fresh` gives vectors for sums.

    Vectors are added up late: while there is nothing else to do (`work`), or by whoever reads the `halves`, in the same
    pass over memory. `late` is what is to be added up, in this order.
    """

    def __init__(self, num_shards: int, finish: Finish | None = None, fresh: Callable[[], Any] | None = None) -> None:
        self._num_shards, self._finish, self._fresh = num_shards, finish, fresh
        self._by_first: dict[int, tuple[Block, Partial]] = {}
        self._by_stop: dict[int, Block] = {}
        self.late: list[Merge] = []

    def put(self, block: Block, part: Partial) -> None:
        """Take a block's sum and merge halves upwards."""
        merges = self.plan(block, part)
        for merge in merges:
            merge.add_numbers()
        self.late += merges

    def work(self, num_values: int) -> None:
        """Add up so many of the values that are to be added up."""
        merge = self.late[0]
        merge.add_until(min(merge.done + num_values, len(merge.left.vector)))
        if merge.done == len(merge.left.vector):
            del self.late[0]

    def plan(self, block: Block, part: Partial) -> list[Merge]:
        """Take a block's sum, which may not be computed yet. Returns what is to be added up for it, in this order."""
        merges: list[Merge] = []
        while True:
            left = self._by_stop.get(block.first)
            right = self._by_first.get(block.stop)
            if self._is_half_of_all(block):
                break
            if left is not None and left.joins(block, self._num_shards):
                merges.append(self._merge(Block(left.first, block.stop), self._take(left), part))
            elif right is not None and block.joins(right[0], self._num_shards):
                merges.append(self._merge(Block(block.first, right[0].stop), part, self._take(right[0])))
            else:
                break
            block, part = merges[-1].block, merges[-1].total
        self._by_first[block.first] = (block, part)
        self._by_stop[block.stop] = block
        return merges

    def plan_all(self, parts: Iterable[tuple[K, Block, Any]]) -> Planned[K]:
        """Take blocks' vectors, which may not be computed yet, in shard order, each with a key of the caller's."""
        planned: Planned[K] = Planned({}, [], [])
        for key, block, vector in parts:
            planned.parts[key] = Partial(vector, 0, 0.0, 0.0)
            planned.merges += self.plan(block, planned.parts[key])
        planned.nodes += self
        return planned

    def _merge(self, block: Block, left: Partial, right: Partial) -> Merge:
        total = left
        if self._fresh is not None and left.slot != _NO_SLOT:
            total = Partial(self._fresh(), 0, 0.0, 0.0, _NO_SLOT)
        return Merge(block, left, right, total, self._finish)

    def _is_half_of_all(self, block: Block) -> bool:
        """Whether the block is one of the tree's last two: whoever averages adds them in the same pass."""
        width = 1 << (self._num_shards - 1).bit_length() >> 1
        return (block.first, block.stop) in ((0, width), (width, self._num_shards))

    def _take(self, block: Block) -> Partial:
        del self._by_stop[block.stop]
        return self._by_first.pop(block.first)[1]

    def __iter__(self) -> Iterator[tuple[Block, Partial]]:
        """The blocks that could not be merged further, in shard order."""
        return iter([self._by_first[first] for first in sorted(self._by_first)])

    def fold(self) -> tuple[Partial, ...]:
        """The `halves`, with nothing left to be added up."""
        halves = self.halves()
        self._add_up()
        return halves

    def halves(self) -> tuple[Partial, ...]:
        """At most two parts whose sum, left + right, is that of all that was put, once `late` is done.

        They are the halves of the tree, once all of it was put; else whatever came, added up from left to right. To be
        called once, at the end.
        """
        left, *rest = [part for _, part in self]
        last = rest.pop() if rest else None
        if rest:
            self._add_up()
        for part in rest:
            left.add(part)
        return (left,) if last is None else (left, last)

    def _add_up(self) -> None:
        for merge in self.late:
            merge.add_until(len(merge.left.vector))
        self.late.clear()
